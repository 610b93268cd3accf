#!/usr/bin/env bash
# From a fresh machine to a trained, scored MoE vision-language model: the stages and scripts that a cluster runs.
# bash scripts/quickstart.sh            QUICKSTART=full: the whole language model; QUICKSTART=smoke: random weights, 2 minutes
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
PROFILE=${QUICKSTART:-default}
case $PROFILE in default) SUFFIX= ;; smoke | full) SUFFIX=_$PROFILE ;; *) fail "QUICKSTART=$PROFILE: must be default, smoke or full" ;; esac
export QUICKSTART_DIR=${QUICKSTART_DIR:-runs/quickstart$SUFFIX} PYTHONUNBUFFERED=1
RECIPES=scripts/recipes/quickstart$SUFFIX DATA=$QUICKSTART_DIR/data/eval
step() { echo; echo "=== $1 ($(date +%H:%M:%S))"; shift; "$@"; }
step "1/8 install" bash scripts/install.sh; export PATH="$REPO/.venv/bin:$PATH"
step "2/8 models and data" python -m playground.quickstart prepare --profile "$PROFILE" --dir "$QUICKSTART_DIR"
step "3/8 pretrain the projector" bash scripts/train/pretrain.sh $RECIPES/pretrain.yaml
step "4/8 dense instruction tuning" bash scripts/train/sft.sh $RECIPES/sft.yaml
step "5/8 upcycle and train the MoE" bash scripts/train/moe.sh $RECIPES/moe.yaml
step "6/8 train its dense control" bash scripts/train/sft.sh $RECIPES/control.yaml
step "7/8 score MoE, dense control, blind" llava-moe eval "$QUICKSTART_DIR"/{moe,control}/model --data "$DATA" --batch-size 32 \
  --tasks local_gqa,local_pope,local_mmbench --blind "$QUICKSTART_DIR/control/model" --out "$QUICKSTART_DIR/scores"
step "8/8 report" python -m playground.quickstart report --profile "$PROFILE" --dir "$QUICKSTART_DIR"
echo "chat: bash scripts/chat.sh $QUICKSTART_DIR/moe/model     in the browser: bash scripts/demo.sh $QUICKSTART_DIR/moe/model --examples $QUICKSTART_DIR/examples"
