#!/usr/bin/env bash
# Downloads and checks the data sets of benchmarks, so that `llava-moe eval --mirror DIR` scores without network or token.
# bash scripts/prepare_benchmarks.sh SUITE|TASK ... --mirror DIR [--from DIR] [--dry-run] [--check]   (see --help)
HERE=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -ge 1 ] || fail "usage: bash scripts/prepare_benchmarks.sh core|libmoe12|... --mirror DIR [--dry-run] (see --help)"
need_llava_moe
python -c 'import datasets' 2>/dev/null || fail "the Python package datasets is missing: pip install datasets"
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
cd "$HERE" # paths are the caller's
exec python -m data_prep.benchmarks "$@"
