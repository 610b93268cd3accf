#!/usr/bin/env bash
# Stage 3: upcycle the dense checkpoint, then train the experts. Run its dense control with sft.sh on the control recipe.
# bash scripts/train/moe.sh [RECIPE] [key=value ...]   (DRY_RUN=1 only describes it)
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
RECIPE=${1:-scripts/recipes/quickstart/moe.yaml}
need_llava_moe
[ "${DRY_RUN:-0}" = 1 ] || llava-moe upcycle "$RECIPE" "${@:2}"
launch "$RECIPE" "${@:2}"
