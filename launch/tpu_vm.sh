#!/usr/bin/env bash
# A run on Cloud TPU VMs by queued resources (v5e, v5p, v6e; TPU7x: only GKE).
#
#   launch/tpu_vm.sh up --name=mine --zone=us-east5-a --type=v6e-16 \
#     --version=v2-alpha-tpuv6e --spot --nfs=10.0.0.2:/share \
#     -- --config=configs/gdn.py:1p3b --workdir=/mnt/runs/mine
#
#   create  creates the TPU if needed, waits for it, copies this clone to every
#           worker and installs it
#   up      create, then launch.train with the flags after --, then watches. A
#           preempted TPU is deleted and created again, and the run continues
#           from its newest checkpoint. If you end `up`, the run goes on; start
#           it again to watch.
#   status  state of the TPU, and the last line of the log of every worker
#   logs    the last 50 lines of the log of every worker
#   stop    all workers save and end; the TPU stays
#   delete  deletes the TPU at once; `up` deletes only a preempted one
#
#   --name=NAME --zone=ZONE   of the queued resource, required
#   --type=TYPE               such as v5litepod-16, v5p-128, v6e-16
#   --version=VERSION         runtime: v2-alpha-tpuv5-lite, v2-alpha-tpuv5,
#                             v2-alpha-tpuv6e
#   --slices=N                default: 1; mesh.replica is their number
#   --spot                    cheaper, and may be preempted
#   --nfs=HOST:/SHARE         mounted as /mnt/runs on every worker, for runs and
#                             texts
#   --restarts=N              after failures other than preemptions; default: 3
#   --dry_run                 only print the commands
#
# The project is that of gcloud (gcloud config set project). Worker logs are in
# WORKDIR/logs. A TPU is billed until it is deleted.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

verb=${1:-}
case $verb in
  create | up | status | logs | stop | delete) shift ;;
  --help | -h) usage "$0"; exit ;;
  *) refuse "give create, up, status, logs, stop or delete, not '$verb'" ;;
esac
name='' zone='' type='' version='' slices=1 spot='' nfs='' restarts=3
while [ $# -gt 0 ]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --spot) spot=1 ;;
    --nfs=*) nfs=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --dry_run) dry_run=1 ;;
    --help | -h) usage "$0"; exit ;;
    --) shift; break ;;
    *) refuse "unknown option $1; flags of the training come after --" ;;
  esac
  shift
done
named --name "$name"
given --zone "$zone"
if [ "$verb" = create ] || [ "$verb" = up ]; then
  given --type "$type"
  given --version "$version"
  whole --slices "$slices" 1
  whole --restarts "$restarts" 0
fi
if [ "$verb" = up ]; then
  find_workdir "$@"
  case $workdir in
    /*) ;;
    *) refuse "--workdir=$workdir: give a path from /, of a folder that all" \
      "workers share (--nfs mounts one as /mnt/runs)" ;;
  esac
fi

tpu=(gcloud compute tpus queued-resources)
at=(--zone="$zone" --quiet)
poll=30     # seconds
patience=10 # polls without an answer
remote='bash deltanet_jax/launch/tpu_worker.sh' # from the home folder

request() {
  local nodes=(--node-id="$name")
  [ "$slices" = 1 ] || nodes=(--node-count="$slices" --node-prefix="$name")
  act "${tpu[@]}" create "$name" "${at[@]}" --accelerator-type="$type" \
    --runtime-version="$version" "${nodes[@]}" ${spot:+--spot}
}

delete() {
  act "${tpu[@]}" delete "$name" "${at[@]}" --force
}

state() { # empty if there is no TPU
  act "${tpu[@]}" list "${at[@]}" --filter="name~(^|/)$name\$" \
    --format='value(state.state)'
}

on_workers() { # COMMAND for a shell
  act "${tpu[@]}" ssh "$name" "${at[@]}" --node=all --worker=all \
    --command="$1"
}

pack() { # FILE: this clone without ignored files
  if [ -n "$dry_run" ]; then
    echo "git ls-files -co --exclude-standard | tar -czf $1 -T -"
    return
  fi
  (cd "$here/.." && git ls-files -zco --exclude-standard |
    while IFS= read -r -d '' file; do
      if [ -e "$file" ]; then printf '%s\0' "$file"; fi
    done | tar -czf "$1" --null -T -)
}

install() {
  local file=${TMPDIR:-/tmp}/deltanet_jax.tgz
  pack "$file" &&
    act "${tpu[@]}" scp "$file" "$name:" "${at[@]}" --node=all --worker=all &&
    on_workers "mkdir -p deltanet_jax && tar -xzf deltanet_jax.tgz \
-C deltanet_jax && $remote install $(quoted "$nfs")"
}

say() {
  echo "tpu_vm.sh: $*" >&2
}

wanted=1 # to be requested if missing
active() { # waits for the TPU
  local now before=- missing=0
  while :; do
    now=$(state)
    [ "$now" = "$before" ] || say "$name: ${now:-none}"
    before=$now
    [ -z "$now" ] || wanted=
    case $now in
      ACTIVE) return ;;
      SUSPENDED)
        say 'preempted: deleting it and requesting it again'
        delete
        wanted=1
        ;;
      FAILED)
        "${tpu[@]}" describe "$name" "${at[@]}" --format='yaml(state)' >&2
        say "the request failed; fix the cause, then: tpu_vm.sh delete, then up"
        exit 1
        ;;
      '')
        if [ -n "$wanted" ]; then
          request
          wanted=
          continue
        fi
        missing=$((missing + 1))
        if [ "$missing" -ge "$patience" ]; then
          say "$name is gone: someone deleted it"
          exit 1
        fi
        sleep "$poll"
        ;;
      *) sleep "$poll" ;;
    esac
  done
}

begin() { # FLAGS...: starts the run unless it is running
  local answers
  answers=$(on_workers "$remote status" 2>&1) || answers=
  case $answers in
    *' running: '*) say 'a run is already there: watching it' ;;
    *) install && on_workers "$remote start $(quoted "$@")" ;;
  esac
}

watch() { # sets outcome: a worker's exit status, stopped, or lost
  local now answers silent=0 line='' last
  while :; do
    sleep "$poll"
    answers=''
    if now=$(state) && [ "$now" != ACTIVE ]; then
      outcome=lost
      return
    fi
    if [ -z "$now" ] || ! answers=$(on_workers "$remote status" 2>&1) ||
      ! grep -q '^worker ' <<<"$answers"
    then
      # ssh fails before the state says preempted
      silent=$((silent + 1))
      [ "$silent" -lt "$patience" ] && continue
      say "the workers do not answer: $answers"
      exit 1
    fi
    silent=0
    answers=$(grep '^worker ' <<<"$answers" | sort)
    last=${answers%%$'\n'*}
    [ "$last" = "$line" ] || say "$last"
    line=$last
    outcome=$(awk '$3 == "ended" && $4 + 0 { print $4 + 0; exit }' \
      <<<"$answers")
    if [ -n "$outcome" ]; then
      echo "$answers" >&2
      return
    fi
    case $answers in
      *' running: '*) continue ;;
      *' stopped'*) outcome=stopped ;;
      *' idle'*) outcome=lost ;;
      *) outcome=0 ;;
    esac
    return
  done
}

once_active() { # COMMAND...
  local tries
  active
  # a worker that has just booted does not take ssh at once
  for ((tries = 1; ; tries++)); do
    if "$@"; then return; fi
    [ "$tries" -lt "$patience" ] || exit 1
    sleep "$poll"
    active
  done
}

up() { # FLAGS...
  local again=0
  while :; do
    once_active begin "$@"
    watch
    case $outcome in
      0)
        say "done; it is billed until: $0 delete --name=$name --zone=$zone"
        return
        ;;
      stopped)
        say 'stopped and saved; up continues the run'
        return
        ;;
      # 143 without `stop`: the machine is going down
      lost | 143) continue ;;
    esac
    # the others wait for the one that failed
    on_workers "$remote stop 10" >&2 || true
    again=$((again + 1))
    if [ "$outcome" = 2 ] || [ "$again" -gt "$restarts" ]; then
      exit "$outcome"
    fi
    say "a worker ended with status $outcome; starting again," \
      "$again of $restarts"
  done
}

show_create() {
  request
  echo "# until it says ACTIVE, every $poll s:"
  state
  install
}

show_up() { # FLAGS...
  show_create
  on_workers "$remote start $(quoted "$@")"
  echo "# until every worker has ended, every $poll s:"
  on_workers "$remote status"
  echo '# if it is preempted (SUSPENDED), this and then all of the above:'
  delete
}

case $verb in
  create)
    if [ -n "$dry_run" ]; then show_create; else once_active install; fi
    ;;
  up)
    if [ -n "$dry_run" ]; then show_up "$@"; else up "$@"; fi
    ;;
  status)
    state
    on_workers "$remote status"
    ;;
  logs) on_workers "$remote logs" ;;
  stop) on_workers "$remote stop 300" ;;
  delete) delete ;;
esac
