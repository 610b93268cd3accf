# Sourced by common.sh. supervise COMMAND...: runs a launcher, stands between it and signals, and returns its exit code.
# SIGTERM, SIGUSR1: the run is asked to save and leaves with 75 (DeepSpeed's launcher would kill it after 30 seconds, and
# return 1). Ctrl-C ends it at once with 130. RUN holds the recipe and its overrides.

ask_to_stop() {
  STOP_ASKED=1
  echo "+ asked to stop: the run saves after its step" >&2
  if [ -n "${HOSTFILE:-}" ]; then python -m llava_moe.stop "${RUN[@]}" >&2; else : >"$LLAVA_MOE_STOP_FILE"; fi
}

supervise() {
  local child code interrupted=
  STOP_ASKED= LLAVA_MOE_STOP_FILE=$(mktemp -u "${TMPDIR:-/tmp}/llava-moe-stop.XXXXXX"); export LLAVA_MOE_STOP_FILE
  set -m  # a process group of its own, or the terminal's Ctrl-C would come to it twice
  "$@" &
  child=$!; set +m
  trap ask_to_stop TERM USR1
  trap 'interrupted=1; kill -INT -- "-$child"' INT
  trap 'kill -HUP -- "-$child"' HUP
  while :; do wait "$child" && code=0 || code=$?; kill -0 "$child" 2>/dev/null || break; done
  trap - TERM USR1 INT HUP; rm -f "$LLAVA_MOE_STOP_FILE"
  [ -z "$interrupted" ] || return 130
  [ "$code" -lt 225 ] || [ "$code" -eq 255 ] || echo "error: a rank was ended by signal $(( 256 - code )) ($(kill -l $(( 256 - code )) 2>/dev/null))" >&2
  return "$code"
}
