#!/usr/bin/env bash
# Called by install.sh on a Linux machine without GPU: prefers a CPU build of torch, which is several GB smaller.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
TORCH=$(grep '^torch==' requirements/constraints.txt) VISION=$(grep '^torchvision==' requirements/constraints.txt)
.venv/bin/python -c 'import torch' 2>/dev/null && exit 0
PIP=(.venv/bin/python -m pip install --disable-pip-version-check --quiet)
if "${PIP[@]}" "$TORCH+cpu" 2>/dev/null; then
  echo "torch: CPU build found by pip"
elif "${PIP[@]}" uv 2>/dev/null && .venv/bin/uv pip install --quiet --python .venv/bin/python --torch-backend cpu "$TORCH" "$VISION" 2>/dev/null; then
  echo "torch: CPU build found by uv"
else
  echo "torch: no CPU build can be reached; installing the registry's build (several GB, works on a CPU too)"
fi
