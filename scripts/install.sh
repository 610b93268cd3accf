#!/usr/bin/env bash
# Makes .venv and installs llava_moe with pinned versions. Idempotent; needs the network only when something changed.
# bash scripts/install.sh [EXTRAS]   EXTRAS: default train,eval,demo,quickstart; the tests add dev
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
EXTRAS=${1:-train,eval,demo,quickstart} STAMP=.venv/.installed CONSTRAINTS=${LLAVA_MOE_CONSTRAINTS:-requirements/constraints.txt}
PY=$(command -v "${PYTHON:-python3}") || fail "no Python found: install Python 3.11 or newer (or set PYTHON)"
"$PY" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$("$PY" --version 2>&1) is too old: Python 3.11 or newer is needed (set PYTHON to one)"
want=$(cat pyproject.toml requirements/constraints.txt scripts/install.sh | cksum)
have=$(cat $STAMP 2>/dev/null || true)
[ "$have" = "$want $EXTRAS" ] || [ "$have" = "$want $EXTRAS,dev" ] && exit 0
[ -d .venv/bin ] || "$PY" -m venv .venv || fail "could not make .venv (on Debian: apt install python3-venv)"
[ "$(df -Pk .venv | awk 'NR==2 {print $4}')" -gt 4000000 ] || fail "less than 4 GB free where .venv lies: free some space"
PIP=(.venv/bin/python -m pip install --disable-pip-version-check --quiet)
[ "$CONSTRAINTS" = none ] || PIP+=(-c "$CONSTRAINTS")
echo "installing into .venv (extras: $EXTRAS); about 2 minutes and 2 GB"
if ! nvidia-smi -L >/dev/null 2>&1 && [ "$(uname -s)" = Linux ] && [ "$CONSTRAINTS" != none ]; then
  bash scripts/install_cpu_torch.sh
fi
"${PIP[@]}" -e ".[$EXTRAS]" || fail "installation failed (see above): no network, or the disk is full?"
case ",$EXTRAS," in *,eval,*) "${PIP[@]}" --no-deps lmms-eval==0.7.3 || fail "could not install lmms-eval" ;; esac
echo "$want $EXTRAS" > $STAMP
