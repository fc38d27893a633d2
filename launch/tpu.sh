#!/usr/bin/env bash
# Trains on Cloud TPU, through queued resources and gcloud.
#
#   launch/tpu.sh COMMAND [--FLAG=VALUE ...] [--dry_run] [-- FLAGS OF THE TRAINING]
#
#   create   asks for the TPU: it waits in a queue, and costs money once it is there
#   wait     waits until it is there
#   copy     copies a commit to all its workers and installs it
#   run      mounts the bucket and starts the training, on all workers; what ran
#            there is stopped
#   logs     prints the end of a worker's log
#   watch    waits for the end of the training; starts it again after a failure,
#            on a TPU asked for again where this one was taken away
#   delete   gives the TPU back, which ends its costs
#   all      create, wait, copy, run (unless the TPU is there), watch, delete
#
#   --project, --zone      of Google Cloud
#   --run                  name of the run and of its TPU
#   --accelerator          v5litepod-256, v6e-64, v5p-128, v4-64, ...
#   --capacity             spot (the default), on_demand or reserved
#   --bucket               mounted on /mnt/BUCKET; its folder RUN keeps the run,
#                          which goes on from there
#   --config               configs/instruct.py:paper, say
#   --revision             commit to copy, by default HEAD
#   --runtime              software version of the VMs, by default JAX's usual
#   --service_account      that the VMs act as, by default the project's own
#   --max_restarts         before watch gives up, by default 20
#   --poll_seconds         between two looks, by default 60
#   --backoff_seconds      before the first restart, by default 30; doubles with
#                          each that follows within an hour, up to 30 minutes
#   --worker               whose log to print, by default 0; or all
#
# Each may also be a variable of the environment, in capitals. --dry_run prints
# the commands and runs none. Statuses: 0; 2 for a setting that cannot be used;
# 2 or 3 where the training ended so, which no restart mends; 1 otherwise.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

CAPACITY=${CAPACITY:-spot}
REVISION=${REVISION:-HEAD}
MAX_RESTARTS=${MAX_RESTARTS:-20}
POLL_SECONDS=${POLL_SECONDS:-60}
BACKOFF_SECONDS=${BACKOFF_SECONDS:-30}
WORKER=${WORKER:-0}
parse "project zone run accelerator capacity bucket config revision runtime service_account \
max_restarts poll_seconds backoff_seconds worker" "$@"

DESCRIBE=(gcloud compute tpus queued-resources describe)
# A worker that is gone must not keep us waiting.
SSH=(gcloud compute tpus tpu-vm ssh --ssh-flag=-oConnectTimeout=30 --ssh-flag=-oServerAliveInterval=30)
# Looks that may fail in a row: a network that is gone for a moment is no failure
# of the training. Where Google Cloud cannot be asked at all, nothing is deleted.
PATIENCE=10
PATIENCE_UNASKED=60

on_workers() { execute "${SSH[@]}" "$RUN" "${WHERE[@]}" "--worker=$1" "--command=$2"; }

create() {
  local flags=(
    "--node-id=$RUN" "--accelerator-type=$ACCELERATOR"
    "--runtime-version=${RUNTIME:-$RUNTIME_DEFAULT}"
  )
  case $CAPACITY in
    spot) flags+=(--spot) ;;
    reserved) flags+=(--reserved) ;;
  esac
  [[ -z ${SERVICE_ACCOUNT:-} ]] || flags+=("--service-account=$SERVICE_ACCOUNT")
  execute gcloud compute tpus queued-resources create "$RUN" "${WHERE[@]}" "${flags[@]}"
}

# Prints the state of the queued resource; NONE where there is none, UNKNOWN
# where it cannot be had.
state() {
  local answer
  if answer=$("${DESCRIBE[@]}" "$RUN" "${WHERE[@]}" '--format=value(state.state)' 2>&1); then
    printf '%s\n' "${answer##*$'\n'}" # Warnings come first.
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo NONE
  else
    say "$answer"
    echo UNKNOWN
  fi
}

wait_active() {
  local now before='' failures=0
  if [[ $DRY_RUN == true ]]; then
    comment "every $POLL_SECONDS s, until it prints ACTIVE:"
    quote "${DESCRIBE[@]}" "$RUN" "${WHERE[@]}" '--format=value(state.state)'
    return
  fi
  while now=$(state); do
    [[ $now == "$before" ]] || say "$RUN: $now"
    before=$now
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | PREEMPTED | DELETING | NONE) return 1 ;;
      UNKNOWN) ((++failures < PATIENCE)) || return 1 ;;
      *) failures=0 ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

copy() {
  local tarball=dist/$RUN.tar.gz
  cd "$ROOT"
  if [[ $DRY_RUN == true ]]; then
    execute cd "$ROOT"
  elif ! git diff --quiet "$REVISION" --; then
    say "note: what differs from $REVISION in this clone is not copied"
  fi
  execute mkdir -p dist &&
    execute git archive --format=tar.gz "--output=$tarball" "$REVISION" &&
    execute gcloud compute tpus tpu-vm scp "$tarball" "$RUN:code.tar.gz" "${WHERE[@]}" --worker=all &&
    on_workers all 'rm -rf code && mkdir code && tar -xzf code.tar.gz -C code && code/launch/worker.sh install'
}

run() { on_workers all "code/launch/worker.sh start $(quote "$BUCKET" "${TRAINING[@]}")"; }

logs() { on_workers "$WORKER" 'code/launch/worker.sh log'; }

delete() {
  execute gcloud compute tpus queued-resources delete "$RUN" "${WHERE[@]}" --force --quiet
}

bring_up() { create && wait_active && copy && run; }

# Prints how the training does, all workers taken together: 0 or another exit
# status, running, lost, or unknown where some cannot be reached.
progress() {
  local answer found word final reached=true
  answer=$("${SSH[@]}" "$RUN" "${WHERE[@]}" --worker=all '--command=code/launch/worker.sh status' 2>&1) ||
    reached=false
  found=" $(grep -o 'status=[a-z0-9]*' <<<"$answer" | cut -d= -f2 | sort -u | tr '\n' ' ' || true)"
  for final in $FINAL_STATUSES; do
    [[ $found != *" $final "* ]] || { echo "$final" && return; }
  done
  for word in $found; do
    [[ $word == 0 || $word == running ]] || { echo "$word" && return; }
  done
  if [[ $reached == false || $found == ' ' ]]; then
    say "$answer"
    echo unknown
  elif [[ $found == *running* ]]; then
    echo running
  else
    echo 0
  fi
}

# Waits until the training has ended for good. One look after the other: at the
# TPU, then at the training on it.
watch() {
  local now what failures=0 unasked=0 restarts=0 streak=0 delay started=$SECONDS
  if [[ $DRY_RUN == true ]]; then
    comment "every $POLL_SECONDS s, until it prints something other than ACTIVE:"
    quote "${DESCRIBE[@]}" "$RUN" "${WHERE[@]}" '--format=value(state.state)'
    comment 'and, until each worker prints status=0, or one of them another number:'
    on_workers all 'code/launch/worker.sh status'
    comment "after a failure, up to $MAX_RESTARTS times, unless its status is one of $FINAL_STATUSES:"
    run
    comment 'where the TPU was taken away:'
    delete && bring_up
    return
  fi
  trap 'say "$RUN goes on without being watched, and costs money until: launch/tpu.sh delete"; exit 130' INT
  while true; do
    now=$(state)
    what=unknown
    [[ $now == UNKNOWN ]] || unasked=0
    [[ $now != ACTIVE ]] || what=$(progress)
    case $now-$what in
      ACTIVE-0)
        say "$RUN: done"
        return 0
        ;;
      ACTIVE-running) failures=0 ;;
      SUSPENDING-* | DELETING-*) ;; # Cannot be deleted before that is over.
      ACTIVE-unknown) ((++failures)) ;;
      UNKNOWN-*)
        if ((++unasked == PATIENCE_UNASKED)); then
          say "$RUN: gives up asking for it; it may go on, and costs money until it is deleted"
          return 1
        fi
        ;;
      CREATING-* | ACCEPTED-* | WAITING_FOR_RESOURCES-* | PROVISIONING-*) # Of an earlier create.
        if wait_active && copy && run; then failures=0; else failures=$PATIENCE; fi
        ;;
      *) failures=$PATIENCE ;;
    esac
    if ((failures >= PATIENCE)); then
      say "$RUN: the TPU is $now, the training $what"
      if [[ " $FINAL_STATUSES " == *" $what "* ]]; then
        logs || true
        say "$RUN: status $what, which a restart does not mend: read the log above"
        return "$what"
      fi
      if ((restarts == MAX_RESTARTS)); then
        [[ $now != ACTIVE ]] || logs || true
        say "$RUN: gives up after $restarts restarts"
        return 1
      fi
      ((SECONDS - started < 3600)) || streak=0
      delay=$((BACKOFF_SECONDS << (streak < 6 ? streak : 6)))
      ((delay <= 1800)) || delay=1800
      ((++restarts, ++streak))
      say "$RUN: restart $restarts of $MAX_RESTARTS in $delay s"
      sleep "$delay"
      failures=0
      if [[ $now == ACTIVE && $what != unknown ]]; then
        run || true
      else
        [[ $now == NONE ]] || delete || true
        bring_up || true
      fi
      started=$SECONDS
    fi
    sleep "$POLL_SECONDS"
  done
}

all() {
  local status=0
  if [[ $DRY_RUN == true || $(state) == NONE ]]; then
    create || return
    if ! { wait_active && copy && run; }; then say "$RUN: not started yet"; fi
  fi
  watch || status=$?
  if [[ $DRY_RUN == true || $(state) != NONE ]] && ! delete; then
    say "$RUN: cannot be deleted, and costs money until it is"
    return 1
  fi
  return "$status"
}

case $COMMAND in
  create | wait | copy | run | logs | watch | delete | all) ;;
  '') die "no command: create, wait, copy, run, logs, watch, delete or all (--help says more)" ;;
  *) die "unknown command '$COMMAND': create, wait, copy, run, logs, watch, delete or all" ;;
esac
check_project
check ZONE '[a-z]+-[a-z]+[0-9]+-[a-z]' us-west4-b
check_run
check POLL_SECONDS '[0-9]{1,5}' 60
check WORKER '[0-9]+|all' 0
case $COMMAND in create | watch | all)
  check_accelerator
  check CAPACITY 'spot|on_demand|reserved' 'spot, on_demand or reserved'
  [[ -z ${SERVICE_ACCOUNT:-} ]] || check SERVICE_ACCOUNT '[^ @]+@[^ @]+' name@my-project.iam.gserviceaccount.com
  check MAX_RESTARTS '0|[1-9][0-9]{0,3}' 20
  check BACKOFF_SECONDS '0|[1-9][0-9]{0,3}' 30
  ;;
esac
case $COMMAND in copy | watch | all)
  check REVISION '[^ -][^ ]*' HEAD
  git -C "$ROOT" cat-file -e "$REVISION:launch/worker.sh" 2>/dev/null ||
    die "--revision='$REVISION' cannot be used: it is no commit of this clone that has launch/worker.sh"
  ;;
esac
case $COMMAND in run | watch | all)
  check_bucket
  check_training tpu "$BUCKET_FOLDER/$RUN"
  ;;
esac
case $COMMAND in watch | all) # They copy what they run.
  [[ $CONFIG_FILE != configs/* ]] || git -C "$ROOT" cat-file -e "$REVISION:$CONFIG_FILE" 2>/dev/null ||
    die "--config='$CONFIG' cannot be used: $CONFIG_FILE is not in $REVISION, which is what is copied; commit it"
  ;;
esac
WHERE=("--project=$PROJECT" "--zone=$ZONE")
[[ $DRY_RUN == true ]] || command -v gcloud >/dev/null ||
  die "gcloud is not installed: install Google Cloud's SDK, or look first with --dry_run"

case $COMMAND in
  wait) wait_active ;;
  *) "$COMMAND" ;;
esac
