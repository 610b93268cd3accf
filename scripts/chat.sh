#!/usr/bin/env bash
# Talk to a checkpoint in the terminal; with --question it answers once and leaves.
# bash scripts/chat.sh CHECKPOINT [--image FILE] [--question TEXT] [--max-new-tokens N] [--temperature T] ...
HERE=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -ge 1 ] || fail "usage: bash scripts/chat.sh CHECKPOINT [--image FILE] [--question TEXT] (see llava-moe chat --help)"
need_llava_moe
cd "$HERE" # paths are the caller's
exec llava-moe chat "$@"
