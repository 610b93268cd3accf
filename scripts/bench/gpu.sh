#!/usr/bin/env bash
# What needs a GPU, under 10 minutes: the tests marked gpu; training steps of a recipe's model with and without packing,
# FlashAttention, fused loss, compiled layers; routing telemetry; kernels and routers of the MoE layer beside a dense block.
# Needs no network, data or weights. PARTS="tests step telemetry layer" picks; OUT=FOLDER writes elsewhere than benchmarks/results/.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
PY=$(command -v python || command -v python3)
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
"$PY" benchmarks/packages.py
name=$("$PY" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "_"))')
step=${OUT:-benchmarks/results/training_step} layer=${OUT:-benchmarks/results/moe_layer} status=0; mkdir -p "$step" "$layer"
part() { echo "== $2"; timeout "$1" "$PY" "${@:3}" || { status=$?; echo "== $2 ended with $status (124: after $1 s)"; }; }
for one in ${PARTS:-tests step telemetry layer}; do
  case $one in
    tests) part 120 tests -m pytest -q -m gpu tests/moe tests/model ;;
    step) part 200 "training steps" benchmarks/training_step.py "${RECIPE:-scripts/recipes/siglip2_qwen3_0_6b/moe.yaml}" \
      --json "$step/$name.json" ;;
    telemetry) part 60 "routing telemetry" benchmarks/telemetry.py --device cuda --width 2048 --decoder-layers 24 --length 512 ;;
    layer) for shape in "8 2 1408 512" "8 2 5632 2048" "64 8 1024 2048"; do read -r e k inner width <<<"$shape"
        part 70 "layer of width $width, $e experts" benchmarks/moe_layer.py --device cuda --dtype bfloat16 --tokens 8192 \
          --width "$width" --experts "$e" --k "$k" --intermediate "$inner" --json "$layer/${name}_d${width}_e${e}_k$k.json"
      done ;;
    *) fail "PARTS: $one is unknown (tests, step, telemetry, layer)" ;;
  esac
done
exit "$status"
