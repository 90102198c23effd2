#!/usr/bin/env bash
# Trains on whole nodes of a SLURM cluster with NVIDIA cards, one process a card. Needs sbatch and,
# at the same path on every node, this folder and a Python with `pip install 'echovlm-jax[cuda]'`.
# `launch/slurm.sh --help` says the rest.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/slurm.sh --nodes N --config F.py --workdir DIR [option …] [-- WORD …]

  --nodes N          whole nodes
  --config F.py      the training configuration
  --workdir DIR      the run's folder, on a file system that all nodes share, or s3://…, gs://…
  --gpus N           cards a node (8)
  --cpus N           cores a process (8)
  --time LIMIT       as of sbatch; the partition's own by default
  --partition NAME, --account NAME
                     as of sbatch; so are all variables SBATCH_*
  --notice SECONDS   how long before the limit training is told to save and end (300)
  --retry N          a job in which a process hung or was lost is queued again, unless that would
                     be its Nth restart or a later one; SLURM counts preemptions too (10)
  --python FILE      the Python of the nodes (this checkout's .venv, or python3)
  --wait             end with the job, and with its exit code
  --dry-run          print the command, submit nothing
  WORD …             for training, such as --config.model=start/

A job that reaches its limit, or is preempted, saves and is queued again; it goes on where it was.
A job in which a process hung or was lost is queued again too. One that fails otherwise, or of
which a process was killed, stays failed. The log is echovlm-JOB.log in the folder that you submit from.
TEXT
}

fail() { echo "slurm.sh: error: $*" >&2; exit 2; }

# The job itself: sbatch runs a copy of this file, so that its place is an argument.
if [ "${1:-}" = in-job ]; then
  here=$2 python=$3 retry=$4
  shift 4
  code=0
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it over by itself
  # A process that ends ends the others by itself, and they say which; srun kills what is left.
  srun --kill-on-bad-exit=0 --wait=120 "$python" "$here/train.py" "$@" || code=$?
  again=''
  case $code in
    75) again=yes ;; # it was asked to stop, and has saved
    69) [ "${SLURM_RESTART_COUNT:-0}" -ge "$retry" ] || again=yes ;; # a process hung, or was lost
  esac
  if [ -n "$again" ]; then
    echo "slurm.sh: ended with $code, not done yet: queued again"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
nodes='' config='' workdir='' gpus=8 cpus=8 time='' partition='' account='' notice=300 retry=10 python=''
wait='' dry_run=''
while [ $# -gt 0 ]; do
  case $1 in
    --) shift; break ;;
    -h | --help) usage; exit 0 ;;
    --dry-run) dry_run=yes; shift; continue ;;
    --wait) wait=yes; shift; continue ;;
    --nodes | --config | --workdir | --gpus | --cpus | --time | --partition | --account | --notice \
      | --retry | --python) ;;
    *) fail "unknown option $1; words for training come after --" ;;
  esac
  [ $# -gt 1 ] || fail "$1 has no value"
  printf -v "${1#--}" '%s' "$2"
  shift 2
done
[ -n "$nodes" ] || fail "--nodes is missing"
for number in nodes gpus cpus notice; do
  [[ ${!number} =~ ^[1-9][0-9]*$ ]] || fail "--$number '${!number}' must be a number of at least 1"
done
[[ $retry =~ ^[0-9]+$ ]] || fail "--retry '$retry' must be a number"
[ -n "$config" ] || fail "--config is missing, such as configs/instruction.py"
[ -f "$config" ] || fail "--config $config: no such file"
[ -n "$workdir" ] || fail "--workdir is missing: a folder that all nodes share"
[ -n "$dry_run" ] || command -v sbatch >/dev/null || fail "sbatch is not installed"
if [ -z "$python" ]; then
  python=python3
  [ ! -x "$here/../.venv/bin/python" ] || python=$here/../.venv/bin/python
fi

# --signal is for the job's steps: training is told, this file goes on. Logs of tries are in one file.
command=(
  sbatch --job-name echovlm --nodes "$nodes" --ntasks-per-node "$gpus" --gpus-per-node "$gpus"
  --cpus-per-task "$cpus" --mem 0 --exclusive --requeue --signal "TERM@$notice"
  --output echovlm-%j.log --open-mode append
)
[ -z "$time" ] || command+=(--time "$time")
[ -z "$partition" ] || command+=(--partition "$partition")
[ -z "$account" ] || command+=(--account "$account")
[ -z "$wait" ] || command+=(--wait)
command+=("$here/slurm.sh" in-job "$here" "$python" "$retry" --config "$config" --workdir "$workdir" "$@")

if [ -n "$dry_run" ]; then
  printf -v line '%q ' "${command[@]}"
  echo "${line% }"
else
  echo "slurm.sh: $nodes nodes × $gpus cards: $((nodes * gpus)) card-hours for each hour of the job" >&2
  exec "${command[@]}"
fi
