#!/usr/bin/env bash
# Times every kernel and router of the MoE layer beside a dense block of the same active FLOPs on this CPU, which should
# do nothing else, then what watching the routing costs, then scoring beside lmms-eval's own adapter where a quickstart
# has left a checkpoint; writes benchmarks/results/moe_layer/ and telemetry/ and eval/ beside it. About 20 minutes.
# Arguments go to benchmarks/moe_layer.py.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
need_llava_moe
OUT=${OUT:-benchmarks/results/moe_layer}; mkdir -p "$OUT"
for shape in "8 2 1408" "64 8 352"; do
  read -r experts k intermediate <<<"$shape"
  python benchmarks/moe_layer.py --experts "$experts" --k "$k" --intermediate "$intermediate" \
    --json "$OUT/cpu_e${experts}_k${k}.json" "$@"
done
python benchmarks/telemetry.py --json "$(dirname "$OUT")/telemetry/cpu.json"
RUN=${RUN:-runs/quickstart}
if [ -d "$RUN/control/model" ]; then
  python -m scripts.bench.eval --checkpoint "$RUN/control/model" --data "$RUN/data/eval" --out "$(dirname "$OUT")/eval"
else
  echo "scoring is not timed: no checkpoint in $RUN (bash scripts/quickstart.sh, or RUN=FOLDER)"
fi
