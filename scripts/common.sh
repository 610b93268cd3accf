# Sourced by every script: finds the repository, its Python and the machine. Sets REPO and defines launch().
set -euo pipefail
export REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$REPO"
[ -d .venv/bin ] && export PATH="$REPO/.venv/bin:$PATH"
export TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1 GRADIO_ANALYTICS_ENABLED=False

source "$REPO/scripts/supervise.sh"
fail() { echo "error: $*" >&2; exit 2; }
need_llava_moe() { command -v llava-moe >/dev/null || fail "llava-moe is not installed: bash scripts/install.sh"; }

# launch RECIPE [key=value ...]: one process per GPU, or NPROC processes (default 1) on a CPU, through DeepSpeed.
# SIGTERM makes the run save and leave with the exit code 75; started again, it goes on.
# HOSTFILE=FILE starts them on several nodes, as many on each as its line says (scripts/train/hostfile.example).
launch() {
  need_llava_moe
  local gpus where; gpus=$(nvidia-smi -L 2>/dev/null | wc -l) || gpus=0
  local ranks=${NPROC:-$(( gpus > 0 ? gpus : 1 ))} cores; cores=$(getconf _NPROCESSORS_ONLN)
  where="--num_gpus $ranks"
  if [ -n "${HOSTFILE:-}" ]; then
    [ -f "$HOSTFILE" ] || fail "HOSTFILE=$HOSTFILE: no such file"
    where="--hostfile $HOSTFILE" NPROC=$(awk -F 'slots=' '!/^#/ && NF > 1 { n += $2 } END { if (n) print n }' "$HOSTFILE")
    [ -n "$NPROC" ] || fail "HOSTFILE=$HOSTFILE: no line of the form NAME slots=GPUS"
  fi
  [ "${DRY_RUN:-0}" = 1 ] && { [ -z "${HOSTFILE:-}" ] || export NPROC; exec python -m llava_moe.train "$@"; }
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( cores / ranks > 0 ? cores / ranks : 1 ))}
  local port=${MASTER_PORT:-$(python -c 'import socket; s=socket.socket(); s.bind(("127.0.0.1",0)); print(s.getsockname()[1])')}
  RUN=("$@")
  echo "+ deepspeed $where --module llava_moe.train $*"
  # shellcheck disable=SC2086  # two words
  supervise deepspeed $where --no_local_rank --master_port "$port" --module llava_moe.train "$@"
}
