#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster, as a JobSet or through xpk.
#
#   launch/gke.sh COMMAND [--FLAG=VALUE ...] [--dry_run] [-- FLAGS OF THE TRAINING]
#
#   render   prints the JobSet, launch/gke/jobset.yaml filled in
#   apply    starts it, with kubectl
#   xpk      starts the same training with xpk, on a cluster that xpk made
#   attach   what xpk needs once for each bucket: makes it a storage of the cluster
#   status   prints how the JobSet and its pods are
#   logs     prints the end of the logs of the first host of each slice
#   delete   stops it; node pools stay, and cost money, unless they scale down
#
#   --project, --location  of the cluster; for xpk the location is a zone
#   --cluster              its name
#   --context              for kubectl, by default gke_PROJECT_LOCATION_CLUSTER
#   --namespace            by default "default"
#   --run                  name of the run and of its JobSet
#   --accelerator          v5litepod-256, v6e-64, v5p-128, v4-64, ...
#   --slices               of that kind, by default 1
#   --image                made from launch/Dockerfile
#   --bucket               mounted on /mnt/BUCKET; its folder RUN keeps the run,
#                          which goes on from there
#   --config               configs/instruct.py:paper, say
#   --service_account      of Kubernetes, by default "default"
#   --max_restarts         of the whole set, by default 20
#   --grace_seconds        to write a checkpoint in before a pod is killed, by
#                          default 300
#
# Each may also be a variable of the environment, in capitals. --dry_run prints
# the commands and runs none. A setting that cannot be used is status 2.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

NAMESPACE=${NAMESPACE:-default}
SLICES=${SLICES:-1}
SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-default}
MAX_RESTARTS=${MAX_RESTARTS:-20}
GRACE_SECONDS=${GRACE_SECONDS:-300}
parse "project location cluster context namespace run accelerator slices image bucket config \
service_account max_restarts grace_seconds" "$@"

render() {
  python3 "$ROOT/launch/gke/render.py" "$ROOT/launch/gke/jobset.yaml" \
    "run=$RUN" "namespace=$NAMESPACE" "slices=$SLICES" "hosts=$HOSTS" "chips=$CHIPS" \
    "accelerator=$GKE_ACCELERATOR" "topology=$TOPOLOGY" "image=$IMAGE" \
    "service_account=$SERVICE_ACCOUNT" "max_restarts=$MAX_RESTARTS" \
    "grace_seconds=$GRACE_SECONDS" "final_statuses=$FINAL_STATUSES" \
    "bucket=$BUCKET" "bucket_folder=$BUCKET_FOLDER" "mount_options=$MOUNT_OPTIONS" \
    -- "${TRAINING[@]}"
}

apply() {
  local jobset
  jobset=$(render)
  if [[ $DRY_RUN == true ]]; then
    printf "%s <<'JOBSET'\n%s\nJOBSET\n" "$(quote "${KUBECTL[@]}" apply --filename=-)" "$jobset"
  else
    execute "${KUBECTL[@]}" apply --filename=- <<<"$jobset"
  fi
}

# For Kubernetes, whose names have no dots and underscores.
storage() { printf '%s\n' "${BUCKET//[._]/-}"; }

# The size is a formality of Kubernetes.
attach() {
  execute xpk storage attach "$(storage)" "--project=$PROJECT" "--zone=$LOCATION" \
    "--cluster=$CLUSTER" --type=gcsfuse "--bucket=$BUCKET" "--mount-point=$BUCKET_FOLDER" \
    "--mount-options=$MOUNT_OPTIONS" --no-prefetch-metadata --readonly=false --auto-mount=false --size=1
}

# xpk runs the command in a shell, and starts again on statuses 42 and 127 to 255
# unless told more: all but the final ones, as the JobSet does.
xpk_create() {
  comment 'once for each bucket, before: launch/gke.sh attach'
  execute xpk workload create "--project=$PROJECT" "--zone=$LOCATION" "--cluster=$CLUSTER" \
    "--workload=$RUN" "--tpu-type=$ACCELERATOR" "--num-slices=$SLICES" "--docker-image=$IMAGE" \
    "--storage=$(storage)" "--max-restarts=$MAX_RESTARTS" --restart-on-exit-codes=1,4-126 \
    "--termination-grace-period-seconds=$GRACE_SECONDS" "--command=$(quote "${TRAINING[@]}")"
}

status() {
  execute "${KUBECTL[@]}" get jobset "$RUN"
  execute "${KUBECTL[@]}" get pods "--selector=jobset.sigs.k8s.io/jobset-name=$RUN" --output=wide
}

logs() {
  execute "${KUBECTL[@]}" logs --prefix --tail=100 --all-containers \
    "--selector=jobset.sigs.k8s.io/jobset-name=$RUN,batch.kubernetes.io/job-completion-index=0"
}

delete() { execute "${KUBECTL[@]}" delete jobset "$RUN"; }

case $COMMAND in
  render | apply | xpk | attach | status | logs | delete) ;;
  '') die "no command: render, apply, xpk, attach, status, logs or delete (--help says more)" ;;
  *) die "unknown command '$COMMAND': render, apply, xpk, attach, status, logs or delete" ;;
esac
[[ $COMMAND == attach ]] || check_run
if [[ $COMMAND != render ]]; then
  check_project
  check CLUSTER '[a-z]([a-z0-9-]{0,38}[a-z0-9])?' my-cluster
  check LOCATION '[a-z]+-[a-z]+[0-9]+(-[a-z])?' us-west4
fi
check NAMESPACE '[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?' default
case $COMMAND in render | apply | xpk)
  check_accelerator
  check SLICES '[1-9][0-9]{0,3}' 1
  check IMAGE '[^ ]*[a-zA-Z][^ ]*' us-docker.pkg.dev/my-project/images/unicode_jax:tpu
  check SERVICE_ACCOUNT '[a-z0-9]([a-z0-9.-]*[a-z0-9])?' default
  check MAX_RESTARTS '0|[1-9][0-9]{0,3}' 20
  check GRACE_SECONDS '[1-9][0-9]{1,4}' 300
  check_bucket
  check_training tpu "$BUCKET_FOLDER/$RUN"
  ((SLICES == 1 || HOSTS > 1)) || die "--slices=$SLICES cannot be used: several slices need more than one host each, and $ACCELERATOR has one"
  ;;
esac
[[ $COMMAND != attach ]] || check_bucket
if [[ $COMMAND == xpk || $COMMAND == attach ]]; then
  check LOCATION '[a-z]+-[a-z]+[0-9]+-[a-z]' 'us-west4-b (xpk wants a zone)'
  tool=xpk
else
  tool=kubectl
fi
[[ $DRY_RUN == true || $COMMAND == render ]] || command -v "$tool" >/dev/null ||
  die "$tool is not installed: install it, or look first with --dry_run"
KUBECTL=(kubectl "--context=${CONTEXT:-gke_${PROJECT:-}_${LOCATION:-}_${CLUSTER:-}}" "--namespace=$NAMESPACE")

case $COMMAND in
  xpk) xpk_create ;;
  *) "$COMMAND" ;;
esac
