#!/usr/bin/env bash
# A run on TPU slices of a GKE cluster, as a JobSet (v0.10 or newer).
#
#   launch/gke.sh --name=mine --image=REGISTRY/deltanet_jax:tpu \
#     --type=v6e --topology=4x4 --slices=2 --claim=runs \
#     -- --config=configs/gdn.py:1p3b --workdir=/mnt/runs/mine \
#     --config.mesh.replica=2 --config.mesh.fsdp=16
#
# Flags after -- are passed to launch.train on every host.
#
#   --name=NAME       of the JobSet
#   --image=IMAGE     what Dockerfile builds, with requirements-tpu.txt
#   --type=TYPE       v5e, v5p, v6e or tpu7x, in node pools of 4-chip hosts
#   --topology=AxB    of one slice (v5p and tpu7x: AxBxC)
#   --slices=N        default: 1; mesh.replica is their number
#   --claim=NAME      a ReadWriteMany PersistentVolumeClaim, mounted as
#                     /mnt/runs: runs and texts
#   --namespace=NAME  default: default
#   --queue=NAME      a Kueue LocalQueue, where the cluster has Kueue
#   --spot            on spot nodes
#   --restarts=N      after failures; default: 10; preemptions do not count
#   --dry_run         only print the manifest
#
# If a pod fails, all restart from the newest checkpoint; bad input (exit status
# 2) ends the JobSet.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

name='' image='' type='' topology='' slices=1 claim='' namespace=default
queue='' spot='' restarts=10
while [ $# -gt 0 ]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --claim=*) claim=${1#*=} ;;
    --namespace=*) namespace=${1#*=} ;;
    --queue=*) queue=${1#*=} ;;
    --spot) spot=1 ;;
    --restarts=*) restarts=${1#*=} ;;
    --dry_run) dry_run=1 ;;
    --help | -h) usage "$0"; exit ;;
    --) shift; break ;;
    *) refuse "unknown option $1; flags of the training come after --" ;;
  esac
  shift
done
named --name "$name"
given --image "$image"
named --claim "$claim"
named --namespace "$namespace"
[ -z "$queue" ] || named --queue "$queue"
whole --slices "$slices" 1
whole --restarts "$restarts" 0
find_workdir "$@"
case $workdir in
  /mnt/runs/*) ;;
  *) refuse "--workdir=$workdir: give /mnt/runs/NAME; a pod's own files end" \
    'with it' ;;
esac

case $type in
  v5e) accelerator=tpu-v5-lite-podslice axes=2 ;;
  v5p) accelerator=tpu-v5p-slice axes=3 ;;
  v6e) accelerator=tpu-v6e-slice axes=2 ;;
  tpu7x) accelerator=tpu7x axes=3 ;;
  *) refuse "--type=$type: give v5e, v5p, v6e or tpu7x" ;;
esac
chips=1
IFS=x read -r -a sizes <<<"$topology"
[ "${#sizes[@]}" = "$axes" ] ||
  refuse "--topology=$topology: $type has $axes sizes, as in" \
    "$([ "$axes" = 2 ] && echo 4x4 || echo 2x2x4)"
for size in "${sizes[@]}"; do
  whole --topology "$size" 1
  chips=$((chips * size))
done
per_host=4
[ "$chips" != 1 ] || per_host=1
[ $((chips % per_host)) = 0 ] ||
  refuse "--topology=$topology: $chips chips are no whole number of hosts of 4"
hosts=$((chips / per_host))

text() { # a string of JSON, which YAML reads, without Kubernetes' own $(…)
  local s=$1
  s=${s//\\/\\\\}
  s=${s//\"/\\\"}
  s=${s//$'\n'/\\n}
  s=${s//$'\t'/\\t}
  s=${s//\$(/\$\$(}
  echo "\"$s\""
}

flags() { # one a line
  local flag
  for flag in --distributed "$@"; do
    echo "              - $(text "$flag")"
  done
}

# the failure's message tells the two rules of podFailurePolicy apart
manifest() {
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  namespace: $namespace
YAML
  [ -z "$queue" ] || cat <<YAML
  labels:
    kueue.x-k8s.io/queue-name: $queue
YAML
  cat <<YAML
  annotations:
    # a slice is a node pool
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
    - name: badinput
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
      onJobFailureMessagePatterns: ["exit code 2 matching"]
    - name: preempted
      action: RestartJobSetAndIgnoreMaxRestarts
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: $slices
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        completionMode: Indexed
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              containerName: train
              operator: In
              values: [2]
          - action: FailJob
            onPodConditions:
            - type: DisruptionTarget
              status: "True"
        template:
          spec:
            restartPolicy: Never
            # SIGTERM saves; a spot node gives less
            terminationGracePeriodSeconds: 120
            hostNetwork: true
            dnsPolicy: ClusterFirstWithHostNet
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $accelerator
              cloud.google.com/gke-tpu-topology: $topology
YAML
  [ -z "$spot" ] || cat <<YAML
              cloud.google.com/gke-spot: "true"
YAML
  cat <<YAML
            tolerations:
            - key: google.com/tpu
              operator: Exists
YAML
  [ -z "$spot" ] || cat <<YAML
            - key: cloud.google.com/gke-spot
              operator: Exists
YAML
  cat <<YAML
            containers:
            - name: train
              image: $(text "$image")
              command: [python, -m, launch.train]
              args:
$(flags "$@")
              # the chips' device files and the share belong to root
              securityContext:
                privileged: true
                runAsUser: 0
              resources:
                requests:
                  google.com/tpu: $per_host
                limits:
                  google.com/tpu: $per_host
              volumeMounts:
              - name: runs
                mountPath: /mnt/runs
              - name: memory
                mountPath: /dev/shm
            volumes:
            - name: runs
              persistentVolumeClaim:
                claimName: $claim
            - name: memory
              emptyDir:
                medium: Memory
YAML
}

if [ -n "$dry_run" ]; then
  manifest "$@"
else
  manifest "$@" | kubectl apply -f -
fi
