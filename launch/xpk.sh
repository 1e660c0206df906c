#!/usr/bin/env bash
# The same as launch/gke.sh on a cluster made by xpk (pip install xpk).
#
#   launch/xpk.sh --cluster=CLUSTER --zone=us-east5-b --name=mine \
#     --image=REGISTRY/deltanet_jax:tpu --type=v6e-16 --slices=2 \
#     --storage=runs -- --config=configs/gdn.py:1p3b \
#     --workdir=/mnt/runs/mine --config.mesh.replica=2 --config.mesh.fsdp=16
#
# Flags after -- are passed to launch.train on every host.
#
#   --cluster=NAME --zone=ZONE  of the cluster; the project is gcloud's own
#   --name=NAME                 of the workload
#   --image=IMAGE               what Dockerfile builds with requirements-tpu.txt
#   --type=TYPE                 in the names of xpk: v5p-8, v6e-16, tpu7x-128
#   --slices=N                  default: 1; mesh.replica is their number
#   --storage=NAME              of `xpk storage`, read and written by all hosts
#                               (gcpfilestore); the workdir is on its mount
#                               point
#   --restarts=N                after failures and preemptions; default: 10
#   --dry_run                   only print the command
#
# xpk restarts a job on exit statuses from 127 on: a lost host, a stop. A
# failure of the run itself (1) and bad input (2) end it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

cluster='' zone='' name='' image='' type='' slices=1 storage='' restarts=10
while [ $# -gt 0 ]; do
  case $1 in
    --cluster=*) cluster=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --storage=*) storage=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --dry_run) dry_run=1 ;;
    --help | -h) usage "$0"; exit ;;
    --) shift; break ;;
    *) refuse "unknown option $1; flags of the training come after --" ;;
  esac
  shift
done
given --cluster "$cluster"
given --zone "$zone"
named --name "$name"
given --image "$image"
given --type "$type"
given --storage "$storage"
whole --slices "$slices" 1
whole --restarts "$restarts" 0
find_workdir "$@"
case $workdir in
  /*) ;;
  *) refuse "--workdir=$workdir: give a path on the storage's mount point" ;;
esac

# exec, so that SIGTERM reaches Python: xpk runs the command in a subshell
command=$(quoted exec python -m launch.train --distributed "$@")
act xpk workload create --cluster="$cluster" --zone="$zone" \
  --workload="$name" --docker-image="$image" --tpu-type="$type" \
  --num-slices="$slices" --storage="$storage" --max-restarts="$restarts" \
  --termination-grace-period-seconds=120 --command="$command"
