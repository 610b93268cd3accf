#!/usr/bin/env bash
# What needs a GPU, under 10 minutes: the tests marked gpu, then every kernel and router of the MoE layer beside a dense
# block in bfloat16; writes benchmarks/results/moe_layer/. OUT=FOLDER writes elsewhere.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || fail "torch sees no CUDA device: llava-moe doctor"
OUT=${OUT:-benchmarks/results/moe_layer}; mkdir -p "$OUT"
timeout 240 python -m pytest -q -m gpu
name=$(python -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "_"))')
for shape in "8 2 1408 512" "8 2 5632 2048" "64 8 1024 2048"; do
  read -r experts k intermediate width <<<"$shape"
  timeout 100 python benchmarks/moe_layer.py --device cuda --dtype bfloat16 --tokens 8192 --width "$width" \
    --experts "$experts" --k "$k" --intermediate "$intermediate" --json "$OUT/${name}_d${width}_e${experts}_k${k}.json"
done
