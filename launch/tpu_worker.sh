#!/usr/bin/env bash
# What tpu_vm.sh runs on every worker of a slice, in the folder that this file is in:
#   install WHEEL [gs://DATA]   a Python, the wheel with its versions pinned, the data on this disk
#   start PROGRAMS WORD…        train in the background, unless it is being trained already;
#                               compiled programs are kept in PROGRAMS, '' for nowhere
#   follow                      print the log from its beginning; ends with training's exit code
#   stop                        SIGTERM: training saves, and ends with 75
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

install() {
  export PATH="$HOME/.local/bin:$PATH"
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/0.13.8/install.sh | sh
  uv venv --quiet --allow-existing --python 3.12 venv
  uv pip install --quiet --python venv/bin/python --constraints constraints.txt "$1[tpu]"
  if [ -n "${2:-}" ]; then
    mkdir -p data
    gcloud storage rsync --recursive "$2" data
  fi
}

# The supervisor's process id is in `job`, training's in `pid`, its exit code in `code`.
is_training() { [ -s job ] && kill -0 "$(cat job)" 2>/dev/null; }

start() {
  if is_training; then
    echo "is training already, with what it was started with: stop it first to change that" >&2
    return
  fi
  rm -f code pid
  nohup setsid bash "$PWD/tpu_worker.sh" supervise "$@" >log 2>&1 </dev/null &
  echo $! >job
}

supervise() {
  local code=0
  export JAX_COMPILATION_CACHE_DIR=$1
  shift
  venv/bin/python launch/train.py "$@" &
  echo $! >pid
  wait $! || code=$?
  echo "$code" >code
}

follow() {
  [ -s job ] || { echo "nothing was started here" >&2; exit 2; }
  tail --lines=+1 --follow --pid="$(cat job)" log
  [ -s code ] || { echo "training was killed: it left no exit code" >&2; exit 137; }
  exit "$(cat code)"
}

stop() {
  is_training || { echo "is not training" >&2; return; }
  kill -TERM "$(cat pid)"
}

action=$1
shift
case $action in
  install | start | supervise | follow | stop) "$action" "$@" ;;
  *) echo "tpu_worker.sh: error: unknown action $action" >&2; exit 2 ;;
esac
