#!/usr/bin/env bash
# Stage 2: visual instruction tuning. bash scripts/train/sft.sh [RECIPE] [key=value ...]   (DRY_RUN=1 only describes it)
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
RECIPE=${1:-scripts/recipes/quickstart/sft.yaml}
launch "$RECIPE" "${@:2}"
