#!/usr/bin/env bash
# One machine, several processes: one per GPU, or on CPUs, to simulate several
# machines.
#
#   launch/local.sh --processes=2 -- --config=configs/quickstart.py \
#     --workdir=runs/two --config.mesh.data=2
#
# Flags after -- are passed to launch.train, run by the `python` on PATH.
#
#   --processes=N  default: 2
#   --restarts=N   after failures, from the newest checkpoint; default: 0
#   --dry_run      only print the commands
#
# Process I writes to WORKDIR/logs/worker-I.log, process 0 to the terminal too.
# If one fails, the others are ended. SIGTERM and Ctrl-C reach all of them: they
# save, and the command ends with their exit status; a second signal kills them.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

processes=2 restarts=0
while [ $# -gt 0 ]; do
  case $1 in
    --processes=*) processes=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --dry_run) dry_run=1 ;;
    --help | -h) usage "$0"; exit ;;
    --) shift; break ;;
    *) refuse "unknown option $1; flags of the training come after --" ;;
  esac
  shift
done
whole --processes "$processes" 1
whole --restarts "$restarts" 0
find_workdir "$@"
cd "$here/.."

gpus=()
if [ "${JAX_PLATFORMS:-}" != cpu ] && command -v nvidia-smi >/dev/null; then
  query=(nvidia-smi --query-gpu=index "--format=csv,noheader")
  all=${CUDA_VISIBLE_DEVICES:-$("${query[@]}")}
  IFS=$', \n' read -r -d '' -a gpus <<<"$all" || true
  [ ${#gpus[@]} -ge "$processes" ] || refuse "--processes=$processes and" \
    "${#gpus[@]} GPUs; give at most one process for each, or JAX_PLATFORMS=cpu"
fi

free_port() {
  python -c 'import socket
with socket.socket() as s:
  s.bind(("localhost", 0))
  print(s.getsockname()[1])'
}

worker() { # PROCESS PORT FLAGS...: sets command
  command=(
    env ${gpus[0]+"CUDA_VISIBLE_DEVICES=${gpus[$1]}"}
    python -m launch.train --coordinator="localhost:$2"
    --processes="$processes" --process="$1" "${@:3}"
  )
}

if [ -n "$dry_run" ]; then
  for ((i = 0; i < processes; i++)); do
    worker "$i" PORT "$@"
    quoted "${command[@]}"
  done
  exit
fi

new=
[ -e "$workdir" ] || new=1
logs=$workdir/logs
mkdir -p "$logs"

start() { # FLAGS...: sets pids and, to nothing, ended
  local i port
  port=$(free_port)
  for ((i = 0; i < processes; i++)); do
    worker "$i" "$port" "$@"
    if [ "$i" = 0 ]; then
      "${command[@]}" > >(tee -a "$logs/worker-0.log") \
        2> >(tee -a "$logs/worker-0.log" >&2) &
    else
      "${command[@]}" >>"$logs/worker-$i.log" 2>&1 &
    fi
    pids[i]=$! ended[i]=
  done
}

left() { # the processes that still run
  local i
  for ((i = 0; i < ${#pids[@]}; i++)); do
    if [ -z "${ended[$i]}" ]; then echo "${pids[$i]}"; fi
  done
}

# shellcheck disable=SC2046  # a word for each process
send() { # SIGNAL
  kill "-$1" $(left) 2>/dev/null || true
}

reap() { # notes which have ended; status: of the first to fail
  local i
  sleep 0.2
  for ((i = 0; i < processes; i++)); do
    [ -z "${ended[$i]}" ] || continue
    if kill -0 "${pids[$i]}" 2>/dev/null; then continue; fi
    ended[i]=0
    wait "${pids[$i]}" || ended[i]=$?
    if ! failed && [ "${ended[$i]}" != 0 ]; then
      status=${ended[$i]} first=$i
    fi
  done
}

failed() { # 130 and 143: stopped by a signal, saved
  case $status in 0 | 130 | 143) return 1 ;; esac
}

end() { # processes that wait for a dead one may not react to SIGTERM
  local i
  send TERM
  for ((i = 0; i < 50; i++)); do
    if [ -z "$(left)" ]; then return; fi
    reap
  done
  send KILL
  while [ -n "$(left)" ]; do reap; done
}

stopping=
# shellcheck disable=SC2329  # the trap's
stop() {
  if [ -n "$stopping" ]; then
    send KILL
    exit 137
  fi
  stopping=1
  echo 'local.sh: saving and stopping; a second signal kills' >&2
  send TERM
}

pids=() ended=()
trap stop TERM INT
for ((attempt = 1; ; attempt++)); do
  status=0 first=
  start "$@"
  while [ -n "$(left)" ]; do
    reap
    if failed; then end; fi
  done
  failed || break
  echo "local.sh: process $first ended with status $status:" >&2
  tail -n 3 "$logs/worker-$first.log" >&2
  if [ -n "$stopping" ] || [ "$status" = 2 ] || [ "$attempt" -gt "$restarts" ]
  then
    break
  fi
  echo "local.sh: starting again, $attempt of $restarts" >&2
done
# bad input leaves nothing behind
if [ "$status" = 2 ] && [ -n "$new" ] && [ ! -e "$workdir/config.json" ]; then
  rm -r "$logs"
  rmdir "$workdir"
fi
exit "$status"
