#!/usr/bin/env bash
# Runs on every worker of a Cloud TPU; launch/tpu_vm.sh calls it over ssh.
#
#   install SHARE   makes .venv from requirements-tpu.txt; mounts the share
#   start FLAGS...  starts launch.train, detached from the connection
#   status          idle, running, ended or stopped; the last line of the log
#   stop SECONDS    SIGTERM, then SIGKILL if it does not end in time
#   logs            the last 50 lines
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
job=$HOME/deltanet_jax.job # files: pid, log, status if ended, stopped
mkdir -p "$job"

install() { # SHARE or nothing
  if [ -n "$1" ] && ! mountpoint -q /mnt/runs; then
    sudo apt-get update -qq
    sudo apt-get install -y -qq nfs-common
    sudo mkdir -p /mnt/runs
    sudo mount -t nfs "$1" /mnt/runs
    sudo chmod a+rwx /mnt/runs
  fi
  # the Python of the runtime may be older than 3.11
  PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null ||
    curl -LsSf https://astral.sh/uv/install.sh | sh
  uv venv --quiet --allow-existing --python 3.12 "$root/.venv"
  uv pip install --quiet --python "$root/.venv/bin/python" \
    -r "$root/requirements-tpu.txt"
  echo "worker $(hostname) installed"
}

running() {
  [ -s "$job/pid" ] && [ ! -e "$job/status" ] &&
    kill -0 "$(cat "$job/pid")" 2>/dev/null
}

start() { # FLAGS...
  local flag workdir=
  stop 10 >/dev/null # an interrupted start
  for flag in "$@"; do
    case $flag in --workdir=*) workdir=${flag#*=} ;; esac
  done
  mkdir -p "$workdir/logs"
  rm -f "$job"/*
  echo "$workdir/logs/worker-$(hostname).log" >"$job/log"
  setsid nohup bash "$0" job "$@" >>"$(cat "$job/log")" 2>&1 </dev/null &
  until [ -s "$job/pid" ]; do sleep 0.1; done
  echo "worker $(hostname) started"
}

run() { # FLAGS...
  local status=0
  cd "$root"
  .venv/bin/python -m launch.train --distributed "$@" &
  echo $! >"$job/pid"
  wait $! || status=$?
  echo "$status" >"$job/status"
}

last() { # LINES
  if [ -s "$job/log" ]; then tail -n "$1" "$(cat "$job/log")"; fi
}

status() {
  local is=idle
  if running; then
    is="running: $(last 1)"
  elif [ -e "$job/stopped" ]; then
    is=stopped
  elif [ -s "$job/pid" ]; then
    # no status: the machine went down
    is="ended $(cat "$job/status" 2>/dev/null || echo 1): $(last 1)"
  fi
  echo "worker $(hostname) $is"
}

stop() { # SECONDS
  local i
  if running; then
    touch "$job/stopped"
    kill -TERM "$(cat "$job/pid")"
    for ((i = 0; i < $1 * 2; i++)); do
      running || break
      sleep 0.5
    done
    if running; then kill -KILL "$(cat "$job/pid")"; fi
  fi
  echo "worker $(hostname) stopped"
}

case $1 in
  install | start | stop) "$@" ;;
  status) status ;;
  logs) last 50 ;;
  job) run "${@:2}" ;;
esac
