#!/usr/bin/env bash
# Compares methods over several seeds beside a dense and a random control, and writes a report. Interrupted, it goes on.
# bash scripts/compare.sh [MATRIX.yaml] [key=value ...] [--jobs N] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
MATRIX=scripts/recipes/compare/quickstart_routers.yaml
[[ ${1:-} != *.yaml ]] || { MATRIX=$1; shift; }
need_llava_moe
[ -f "$MATRIX" ] || fail "$MATRIX: no such matrix"
export QUICKSTART_DIR=${QUICKSTART_DIR:-runs/quickstart}
# A matrix on the quickstart's data makes them where they are not there; it needs nothing of the quickstart itself.
case $(basename "$MATRIX") in
  quickstart_*) [[ " $* " == *" --dry-run "* ]] || python -m playground.quickstart prepare --profile default --dir "$QUICKSTART_DIR" ;;
esac
exec llava-moe compare "$MATRIX" "$@"
