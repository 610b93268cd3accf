#!/usr/bin/env bash
# Downloads, unpacks and checks the data that the recipes train on; goes on where it stood when it was interrupted.
# bash scripts/prepare_data.sh llava_pretrain|llava_mix665k ... [--from DIR] [--dry-run] [--delete-archives] ...   (--help)
HERE=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -ge 1 ] || fail "usage: bash scripts/prepare_data.sh llava_pretrain|llava_mix665k ... [--dry-run] (see --help, docs/data.md)"
need_llava_moe
python -c 'import requests' 2>/dev/null || fail "the Python package requests is missing: pip install requests"
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
cd "$HERE" # paths are the caller's; $DATA is read from the repository's folder, as the recipes read it
exec python -m data_prep "$@"
