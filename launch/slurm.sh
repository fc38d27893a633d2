#!/usr/bin/env bash
# Trains on GPUs of a Slurm cluster: submits launch/slurm.sbatch.
#
#   launch/slurm.sh [--FLAG=VALUE ...] [--dry_run] [-- FLAGS OF THE TRAINING]
#
#   --run              name of the run and of the job
#   --runs             folder of runs that all nodes see; its folder RUN keeps
#                      the run, which goes on from there
#   --config           configs/instruct.py:paper, say
#   --nodes            by default 1
#   --gpus_per_node    by default 8; one process each
#   --cpus_per_gpu     by default 8
#   --time             before the job goes back into the queue, by default 24:00:00
#   --partition, --account
#   --max_restarts     by default 20
#   --log_dir          by default runs/slurm
#
# Relative folders are below this repository, where the job runs, with the
# environment of the shell that submits it: `python` must have the package.
#
# Each may also be a variable of the environment, in capitals. --dry_run prints
# the commands and runs none. A setting that cannot be used is status 2.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

NODES=${NODES:-1}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
CPUS_PER_GPU=${CPUS_PER_GPU:-8}
TIME=${TIME:-24:00:00}
MAX_RESTARTS=${MAX_RESTARTS:-20}
LOG_DIR=${LOG_DIR:-runs/slurm}
parse "run runs config nodes gpus_per_node cpus_per_gpu time partition account max_restarts log_dir" "$@"

[[ -z $COMMAND ]] || die "unexpected argument '$COMMAND': put what is for the training behind --"
check_run
check RUNS '[^ -].*' /shared/runs
check NODES '[1-9][0-9]{0,4}' 1
check GPUS_PER_NODE '[1-9][0-9]?' 8
check CPUS_PER_GPU '[1-9][0-9]{0,2}' 8
check TIME '([0-9]+-)?[0-9]+(:[0-9]{1,2}){0,2}' 24:00:00
check MAX_RESTARTS '0|[1-9][0-9]{0,3}' 20
check LOG_DIR '[^ -].*' runs/slurm
check_training gpu "${RUNS%/}/$RUN"
[[ $DRY_RUN == true ]] || command -v sbatch >/dev/null ||
  die "sbatch is not installed: run this where jobs are submitted, or look first with --dry_run"

SBATCH=(
  sbatch "--job-name=$RUN" "--nodes=$NODES" "--gpus-per-node=$GPUS_PER_NODE"
  "--ntasks-per-node=$GPUS_PER_NODE" "--cpus-per-task=$CPUS_PER_GPU" "--time=$TIME"
  "--output=$LOG_DIR/%x-%j.log" "--export=ALL,MAX_RESTARTS=$MAX_RESTARTS"
)
[[ -z ${PARTITION:-} ]] || SBATCH+=("--partition=$PARTITION")
[[ -z ${ACCOUNT:-} ]] || SBATCH+=("--account=$ACCOUNT")
execute cd "$ROOT"
execute mkdir -p "$LOG_DIR"
# The job itself adds what makes the processes join.
execute "${SBATCH[@]}" launch/slurm.sbatch "${TRAINING[@]:3:2}" ${EXTRA[@]+"${EXTRA[@]}"}
