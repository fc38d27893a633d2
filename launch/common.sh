# shellcheck shell=bash disable=SC2034  # Those who source this use the names.
# What the launchers share: flags and their checks, quoting, dry runs, the
# command that trains. Sourced by them; by itself it does nothing.
#
# A setting is a flag or a variable of the environment, --max_restarts=5 or
# MAX_RESTARTS=5; the flag wins. What stands behind -- goes to the training.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Statuses of the program that another attempt cannot change: a flag or config
# that cannot be used, a run that should not go on (unicode_jax/command.py).
FINAL_STATUSES="2 3"
DRY_RUN=false
COMMAND=
EXTRA=()
# Where the hosts see the bucket, once check_bucket knows which.
BUCKET_FOLDER=
# How Cloud Storage FUSE mounts it, for GKE; worker.sh says the same. Folders may
# be renamed, which ends a checkpoint, also in buckets without a hierarchical
# namespace. What other hosts write is seen: at once if it is new, after a minute
# if it is newer; for machines with TPUs, never would be the default.
MOUNT_OPTIONS=implicit-dirs,file-system:rename-dir-limit:200000
MOUNT_OPTIONS+=,metadata-cache:negative-ttl-secs:0,metadata-cache:ttl-secs:60

# Ends with one line for the user, and the status of a bad setting.
die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

say() { printf '%s\n' "$*" >&2; }

# Prints words as one line that a shell reads back as the same words.
quote() {
  local LC_ALL=C word line='' apostrophe="'\\''"
  for word; do
    case $word in
      '' | *[!A-Za-z0-9_@%+=:,./-]*) word="'${word//\'/$apostrophe}'" ;;
    esac
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Runs a command and says which, or only prints it in a dry run.
execute() {
  if [[ $DRY_RUN == true ]]; then
    quote "$@"
  else
    say "+ $(quote "$@")"
    "$@"
  fi
}

# Says something that only a dry run has to explain, as a shell comment.
comment() { [[ $DRY_RUN == false ]] || printf '# %s\n' "$*"; }

# Reads the command line: a command, flags out of $1, and what is behind --.
parse() {
  local known=$1 name variable
  shift
  while (($#)); do
    case $1 in
      --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;;
      --dry_run) DRY_RUN=true ;;
      --)
        EXTRA=("${@:2}")
        return
        ;;
      --*)
        name=${1%%=*}
        name=${name#--}
        [[ $name != config.* ]] || die "--$name is the training's: put it behind --"
        [[ " $known " == *" $name "* ]] ||
          die "there is no flag --$name: choose from --${known// / --} --dry_run --help"
        [[ $1 == *=* ]] || die "--$name needs a value: --$name=VALUE"
        variable=$(tr '[:lower:]' '[:upper:]' <<<"$name")
        printf -v "$variable" %s "${1#*=}"
        ;;
      *)
        [[ -z $COMMAND ]] ||
          die "unexpected argument '$1': put values in quotes, and what is for the training behind --"
        COMMAND=$1
        ;;
    esac
    shift
  done
}

# Refuses a setting that is missing or looks wrong: check NAME PATTERN EXAMPLE.
check() {
  local flag value=${!1:-}
  [[ -z $value || $value == *[[:cntrl:]]* || ! $value =~ ^($2)$ ]] || return 0
  flag=--$(tr '[:upper:]' '[:lower:]' <<<"$1")
  [[ -n $value ]] || die "$flag is missing: $flag=$3, or $1 in the environment"
  [[ $value != *[[:cntrl:]]* ]] || die "$flag has control characters: $flag=$3"
  die "$flag='$value' cannot be used: $flag=$3"
}

check_run() { check RUN '[a-z]([a-z0-9-]{0,26}[a-z0-9])?' 'NAME of up to 28 small letters, digits and hyphens'; }

check_project() { check PROJECT '([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]' my-project; }

# Sets TRAINING, what each process runs, and CONFIG_FILE, of this clone:
# check_training PLATFORM WORKDIR. The folder is the run's own, so that the same
# command goes on where it stopped.
check_training() {
  local word mounted='so mount the bucket on all nodes'
  [[ -z $BUCKET_FOLDER ]] || mounted="and has gs://$BUCKET as $BUCKET_FOLDER"
  check CONFIG '.*[^ ].*' configs/instruct.py:paper
  CONFIG_FILE=${CONFIG%%.py:*}
  [[ $CONFIG_FILE == "$CONFIG" ]] || CONFIG_FILE+=.py
  [[ $CONFIG_FILE != configs/* || -f $ROOT/$CONFIG_FILE ]] ||
    die "--config='$CONFIG' cannot be used: there is no $CONFIG_FILE here"
  for word in "$2" "$CONFIG" ${EXTRA[@]+"${EXTRA[@]}"}; do
    [[ $word != *gs://* ]] || die "'$word' cannot be used: the training knows folders alone, $mounted"
    case ${word%%=*} in --workdir | --config | --config.distributed | --config.platform)
      die "'$word' behind -- cannot be used: the launcher sets ${word%%=*} itself"
      ;;
    esac
  done
  TRAINING=(
    python -m unicode_jax.main "--config=$CONFIG" "--workdir=$2"
    --config.distributed=True "--config.platform=$1" ${EXTRA[@]+"${EXTRA[@]}"}
  )
}

check_bucket() {
  BUCKET=${BUCKET:-}
  BUCKET=${BUCKET#gs://}
  BUCKET=${BUCKET%/}
  check BUCKET '[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]' my-bucket
  BUCKET_FOLDER=/mnt/$BUCKET
}

# Looks ACCELERATOR up: RUNTIME_DEFAULT for a Cloud TPU VM; GKE_ACCELERATOR,
# TOPOLOGY, HOSTS and CHIPS (of a host) for node pools of GKE.
check_accelerator() {
  local size chips example='v5litepod-256, v6e-64, v5p-128 or v4-64, say'
  check ACCELERATOR '(v4|v5litepod|v5p|v6e)-[0-9]+' "$example"
  size=${ACCELERATOR##*-}
  case $ACCELERATOR in
    v4-*) RUNTIME_DEFAULT=tpu-ubuntu2204-base GKE_ACCELERATOR=tpu-v4-podslice ;;
    v5litepod-*) RUNTIME_DEFAULT=v2-alpha-tpuv5-lite GKE_ACCELERATOR=tpu-v5-lite-podslice ;;
    v5p-*) RUNTIME_DEFAULT=v2-alpha-tpuv5 GKE_ACCELERATOR=tpu-v5p-slice ;;
    v6e-*) RUNTIME_DEFAULT=v2-alpha-tpuv6e GKE_ACCELERATOR=tpu-v6e-slice ;;
  esac
  case $ACCELERATOR in
    v5litepod-* | v6e-*) # Named after its chips, which lie in a plane.
      chips=$size
      case $size in
        1) TOPOLOGY=1x1 ;; 4) TOPOLOGY=2x2 ;; 8) TOPOLOGY=2x4 ;;
        16) TOPOLOGY=4x4 ;; 32) TOPOLOGY=4x8 ;; 64) TOPOLOGY=8x8 ;;
        128) TOPOLOGY=8x16 ;; 256) TOPOLOGY=16x16 ;;
        *) die "--accelerator=$ACCELERATOR is of no size known here: 1, 4, 8, 16, 32, 64, 128 or 256" ;;
      esac
      ;;
    *) # Named after its cores, two on a chip; chips lie in a cuboid.
      chips=$((size / 2))
      case $size in
        8) TOPOLOGY=2x2x1 ;; 16) TOPOLOGY=2x2x2 ;; 32) TOPOLOGY=2x2x4 ;;
        64) TOPOLOGY=2x4x4 ;; 128) TOPOLOGY=4x4x4 ;; 256) TOPOLOGY=4x4x8 ;;
        512) TOPOLOGY=4x8x8 ;; 1024) TOPOLOGY=8x8x8 ;; 2048) TOPOLOGY=8x8x16 ;;
        *) die "--accelerator=$ACCELERATOR is of no size known here: 8, 16, 32, 64, 128, 256, 512, 1024 or 2048" ;;
      esac
      ;;
  esac
  CHIPS=$((chips < 4 ? chips : 4))
  HOSTS=$((chips / CHIPS))
}
