#!/usr/bin/env bash
# Installs what the tests need, then lint, types and tests in two processes: the fast ones, then the slow ones, which start
# processes of their own. Arguments go to pytest, e.g. -m "not slow" or -k router.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
bash scripts/install.sh train,eval,demo,quickstart,dev
export PATH="$REPO/.venv/bin:$PATH" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
echo "== ruff"; ruff check . ; ruff format --check .
echo "== mypy"; mypy
echo "== shell"; for f in scripts/*.sh scripts/*/*.sh .ci/run; do bash -n "$f"; done
TWO=(python -m pytest -n 2 --dist loadfile)
if [ $# -gt 0 ]; then echo "== pytest $*"; exec "${TWO[@]}" "$@"; fi
echo "== pytest, fast"; "${TWO[@]}" -m "not slow"
echo "== pytest, slow"; "${TWO[@]}" -m slow
