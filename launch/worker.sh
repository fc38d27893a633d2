#!/usr/bin/env bash
# Runs on every worker of a Cloud TPU, which launch/tpu.sh copied the code to.
#
#   worker.sh install        a Python of our own, and the package in it
#   worker.sh start COMMAND  stops what ran before and starts, detached
#   worker.sh status         prints status=running, lost, or the exit status
#   worker.sh log            prints the end of the log
#
# The training outlives the connection that started it: its process number, log
# and exit status are files in the home folder.
set -euo pipefail
cd

PYTHON=3.11
# Seconds between SIGTERM and SIGKILL: a checkpoint is written in between.
GRACE_SECONDS=${GRACE_SECONDS:-300}

# The images of TPU VMs come with Python 3.10, which is too old.
install() {
  export PATH=$HOME/.local/bin:$PATH
  python3 -m pip install --user --quiet 'uv>=0.8,<1'
  rm -rf venv
  uv venv --quiet --python "$PYTHON" venv
  uv pip install --quiet --python venv/bin/python --editable 'code[tpu]'
}

# A process number may be another's after a reboot, so the name counts too; and
# 1 is never ours, to whose group a signal would reach every process there is.
running() {
  local pid=0
  [[ ! -s train.pid ]] || pid=$(<train.pid)
  [[ $pid =~ ^[0-9]+$ ]] && ((pid > 1)) && grep -qsa unicode_jax "/proc/$pid/cmdline"
}

stop() {
  local left=$GRACE_SECONDS
  running || return 0
  kill -TERM -- "-$(<train.pid)"
  while running && ((left-- > 0)); do sleep 1; done
  ! running || kill -KILL -- "-$(<train.pid)"
}

start() {
  stop
  rm -f train.status
  export PATH=$HOME/venv/bin:$PATH
  cd code
  # A session of its own; the trap lets the shell live to write the status.
  setsid bash -c 'trap : TERM; "$@"; echo $? >~/train.part && mv ~/train.part ~/train.status' \
    train "$@" >>~/train.log 2>&1 </dev/null &
  echo $! >~/train.pid
}

status() {
  if running; then
    echo status=running
  elif [[ -s train.status ]]; then
    echo "status=$(<train.status)"
  else
    echo status=lost
  fi
}

log() { tail -n 100 train.log; }

case ${1:-} in
  install | start | status | log) "$@" ;;
  *) printf 'error: unknown command %q: install, start, status or log\n' "${1:-}" >&2 && exit 2 ;;
esac
