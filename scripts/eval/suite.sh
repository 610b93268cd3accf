#!/usr/bin/env bash
# Scores checkpoints on a suite of benchmarks, on every GPU of this machine (a replica each), or on the CPU.
# bash scripts/eval/suite.sh SUITE|TASKS CHECKPOINT [CHECKPOINT ...] --out DIR [--mirror DIR] [--limit N] ...   (llava-moe eval --help)
HERE=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
[ $# -ge 2 ] || fail "usage: bash scripts/eval/suite.sh SUITE|TASKS CHECKPOINT [CHECKPOINT ...] --out DIR (suites: llava-moe eval --list)"
need_llava_moe
TASKS=$1; shift
GPUS=$(nvidia-smi -L 2>/dev/null | wc -l) || GPUS=0
RANKS=${NPROC:-$(( GPUS > 0 ? GPUS : 1 ))}
[[ $RANKS =~ ^[1-9][0-9]*$ ]] || fail "NPROC=$RANKS: must be a whole number from 1 on"
[ "$GPUS" -gt 0 ] || export ACCELERATE_USE_CPU=true
cd "$HERE" # paths are the caller's
[ "$RANKS" -gt 1 ] || exec llava-moe eval "$@" --tasks "$TASKS"
CORES=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( CORES / RANKS > 0 ? CORES / RANKS : 1 ))}
exec torchrun --standalone --nproc_per_node "$RANKS" -m llava_moe.cli eval "$@" --tasks "$TASKS"
