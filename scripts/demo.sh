#!/usr/bin/env bash
# Talk to a checkpoint in the browser, on this computer only.
# bash scripts/demo.sh CHECKPOINT [--port 7860] [--examples DIR] ...
HERE=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -ge 1 ] || fail "usage: bash scripts/demo.sh CHECKPOINT [--port 7860] [--examples DIR] (see llava-moe demo --help)"
need_llava_moe
cd "$HERE" # paths are the caller's
exec llava-moe demo "$@"
