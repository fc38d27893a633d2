#!/usr/bin/env bash
# Runs on every worker of a Cloud TPU, which launch/tpu.sh copied the code to.
#
#   worker.sh install               a Python of our own with the package, and gcsfuse
#   worker.sh start BUCKET COMMAND  stops what ran before, mounts gs://BUCKET on
#                                   /mnt/BUCKET and starts, detached
#   worker.sh status                prints status=running, lost, or the exit status
#   worker.sh log                   prints the end of the log
#
# The training outlives the connection that started it: its process number, log
# and exit status are files in the home folder.
set -euo pipefail
cd

PYTHON=3.11
# Seconds between SIGTERM and SIGKILL: a checkpoint is written in between.
GRACE_SECONDS=${GRACE_SECONDS:-300}
MOUNTS=${MOUNTS:-/mnt}
# As MOUNT_OPTIONS in common.sh, which says why.
MOUNT_FLAGS=(
  --implicit-dirs --rename-dir-limit=200000
  --metadata-cache-negative-ttl-secs=0 --metadata-cache-ttl-secs=60
)
# A VM that has just started may not have its network or its identity yet.
MOUNT_TRIES=12
RETRY_SECONDS=${RETRY_SECONDS:-10}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# The images of TPU VMs come with Python 3.10, which is too old.
install() {
  export PATH=$HOME/.local/bin:$PATH
  python3 -m pip install --user --quiet 'uv>=0.8,<1'
  rm -rf venv
  uv venv --quiet --python "$PYTHON" venv
  uv pip install --quiet --python venv/bin/python --editable 'code[tpu]'
  install_gcsfuse >gcsfuse.log 2>&1 || fail "gcsfuse cannot be installed: $(tail -n 1 gcsfuse.log)"
}

# From Google's repository of packages, unless it is there: 3 or later, which
# uploads what is written while it is written.
install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc site=https://packages.cloud.google.com/apt
  [[ ! $(gcsfuse --version 2>/dev/null) =~ version\ ([3-9]|[1-9][0-9]+)\. ]] || return 0
  curl -fsSL "$site/doc/apt-key.gpg" | sudo tee "$key" &&
    echo "deb [signed-by=$key] $site gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list || return
  # Other sources of the image may be broken; and a VM that has just started
  # installs its own updates first.
  sudo apt-get -o DPkg::Lock::Timeout=600 update || true
  sudo apt-get -o DPkg::Lock::Timeout=600 install --yes gcsfuse
}

# Mounts gs://$1 on the folder $2, unless it is there, and writes to it. A mount
# that does not answer, as after the end of its process, is replaced.
try_mount() {
  local probe
  if ! mountpoint -q "$2"; then
    fusermount -uz "$2" || true
    sudo mkdir -p "$2" && sudo chown "$(id -u)" "$2" && gcsfuse "${MOUNT_FLAGS[@]}" "$1" "$2" || return
  fi
  if ! { probe=$(timeout 120 mktemp -d "$2/.probe-XXXXXXXX") && rmdir "$probe"; }; then
    fusermount -uz "$2" || true
    return 1
  fi
}

mount_bucket() {
  local left=$MOUNT_TRIES
  until try_mount "$1" "$MOUNTS/$1" >mount.log 2>&1 </dev/null; do
    ((--left > 0)) || return
    sleep "$RETRY_SECONDS"
  done
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
  local bucket=$1
  shift
  stop
  rm -f train.status
  # Where this fails for so long, another attempt would not help: the status is
  # that of a setting that cannot be used.
  if ! mount_bucket "$bucket"; then
    echo "error: gs://$bucket cannot be mounted on $MOUNTS/$bucket: $(grep . mount.log | tail -n 1)" >>train.log
    echo 2 >train.status
    fail "$(tail -n 1 train.log | cut -d ' ' -f 2-)"
  fi
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
