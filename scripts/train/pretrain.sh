#!/usr/bin/env bash
# Stage 1: the projector learns. bash scripts/train/pretrain.sh [RECIPE] [key=value ...]   (DRY_RUN=1 only describes it)
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
RECIPE=${1:-scripts/recipes/quickstart/pretrain.yaml}
launch "$RECIPE" "${@:2}"
