#!/usr/bin/env bash
# Scores checkpoints on the core suite: nine public benchmarks that need no judge, TextVQA and POPE in two readings each.
# bash scripts/eval/core.sh CHECKPOINT [CHECKPOINT ...] --out DIR [--mirror DIR] ...   (llava-moe eval --help)
exec bash "$(dirname "${BASH_SOURCE[0]}")/suite.sh" core "$@"
