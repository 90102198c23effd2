#!/usr/bin/env bash
# Trains on a Cloud TPU slice, or several, by queued resources. Needs gcloud, logged in, and a quota.
# `launch/tpu_vm.sh --help` says the rest.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/tpu_vm.sh ACTION --name NAME --zone ZONE [option …] [-- WORD …]

  run      make the slice, or take the one of that name; install; train on all workers; follow
           until training ends. Exit code: training's. Run it again to resume, or to follow again.
  logs     follow what training prints; it goes on if you stop following
  stop     let training save and end; the slice stays, and costs
  delete   give the slice back, which ends what it costs
  status   the state of the slice

  --topology GEN:SHAPE   as of `echovlm plan`: v4:…, v5e:4x4, v5p:4x4x8, v6e:16x16   (run)
  --config F.py          the training configuration, a file here                     (run)
  --workdir gs://…       the run's folder; a slice's own disks end with it           (run)
  --slices N             slices joined by the data centre's network (1); give also
                         -- --config.mesh.dcn.data=N
  --spot                 cheaper; can be taken away at any time
  --data gs://…          a dataset's folder: copied to every worker, and trained on
  --programs gs://…      compiled programs are kept there for the next try, and one host compiles
                         for all; who may write there runs code on the slice
  --retry N              after a preemption, or where a process was lost or hung, begin again up
                         to N times (0)
  --delete-when-done     delete the slice when training has ended, well or not
  --wheel F.whl          the package; built from this checkout by default
  --runtime VERSION      the image of the workers; by generation by default
  --project PROJECT      gcloud's own by default
  --poll SECONDS         between two looks at the slice's state (30)
  --dry-run              print the commands for a slice that is not there yet, run none
  WORD …                 for training, such as --config.model=gs://bucket/model
TEXT
}

fail() { echo "tpu_vm.sh: error: $*" >&2; exit 2; }
say() { echo "tpu_vm.sh: $*" >&2; }
quoted() { local line; printf -v line '%q ' "$@"; echo "${line% }"; }

# Runs a command, or prints it.
call() {
  if [ -n "$dry_run" ]; then quoted "$@"; else "$@"; fi
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ $# -gt 0 ] || { usage >&2; exit 2; }
case $1 in
  run | logs | stop | delete | status) action=$1 ;;
  -h | --help) usage; exit 0 ;;
  *) fail "unknown action $1; choose run, logs, stop, delete or status" ;;
esac
shift

name='' zone='' topology='' config='' workdir='' data='' programs='' wheel='' runtime='' project='' spot=''
dry_run='' delete_when_done='' slices=1 retry=0 poll=30
while [ $# -gt 0 ]; do
  case $1 in
    --) shift; break ;;
    -h | --help) usage; exit 0 ;;
    --spot) spot=yes; shift; continue ;;
    --dry-run) dry_run=yes; shift; continue ;;
    --delete-when-done) delete_when_done=yes; shift; continue ;;
    --name | --zone | --topology | --config | --workdir | --data | --programs | --wheel | --runtime \
      | --project | --slices | --retry | --poll) ;;
    *) fail "unknown option $1; words for training come after --" ;;
  esac
  [ $# -gt 1 ] || fail "$1 has no value"
  printf -v "${1#--}" '%s' "$2"
  shift 2
done

[ -n "$name" ] || fail "--name is missing: what the slice is to be called"
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "--name '$name' must be small letters, digits and -"
[ -n "$zone" ] || fail "--zone is missing, such as us-west4-a"
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices '$slices' must be a number of at least 1"
[[ $retry =~ ^[0-9]+$ ]] || fail "--retry '$retry' must be a number"
[[ $poll =~ ^[0-9]+$ ]] || fail "--poll '$poll' must be a number of seconds"

where=(--zone "$zone")
[ -z "$project" ] || where+=(--project "$project")
queue=(gcloud compute tpus queued-resources)
if [ "$slices" = 1 ]; then
  nodes=(gcloud compute tpus tpu-vm) target=("${where[@]}" --worker all)
else
  nodes=(gcloud alpha compute tpus queued-resources) target=("${where[@]}" --worker all --node all)
fi

on_workers() { call "${nodes[@]}" ssh "$name" "${target[@]}" --command "bash echovlm/tpu_worker.sh $(quoted "$@")"; }

# Sets type, chips and runtime from the topology.
read_topology() {
  [[ $topology =~ ^(v4|v5e|v5p|v6e):([1-9][0-9]*(x[1-9][0-9]*){1,2})$ ]] \
    || fail "--topology '$topology' must be GENERATION:SHAPE of v4, v5e, v5p or v6e, such as v5e:4x4"
  local generation=${BASH_REMATCH[1]}
  chips=$((${BASH_REMATCH[2]//x/*}))
  case $generation in # v4 and v5p count cores, two a chip
    v4) type=v4-$((2 * chips)) image=tpu-ubuntu2204-base ;;
    v5e) type=v5litepod-$chips image=v2-alpha-tpuv5-lite ;;
    v5p) type=v5p-$((2 * chips)) image=v2-alpha-tpuv5 ;;
    v6e) type=v6e-$chips image=v2-alpha-tpuv6e ;;
  esac
  runtime=${runtime:-$image}
}

check_run() {
  [ -n "$topology" ] || fail "--topology is missing, such as v5e:4x4"
  read_topology
  [ -n "$config" ] || fail "--config is missing, such as configs/instruction.py"
  [ -f "$config" ] || fail "--config $config: no such file"
  [[ $workdir =~ ^(gs|s3)://. ]] || fail "--workdir must be gs://… or s3://…; a slice's disks end with it"
  [[ -z $data || $data =~ ^gs://. ]] || fail "--data '$data' must be gs://…"
  [[ -z $programs || $programs =~ ^gs://. ]] || fail "--programs '$programs' must be gs://…"
  [ -z "$wheel" ] || [ -f "$wheel" ] || fail "--wheel $wheel: no such file"
  [ -n "$wheel" ] || [ -f "$here/../pyproject.toml" ] || fail "--wheel is missing: this is no checkout to build from"
  [ -n "$dry_run" ] || command -v gcloud >/dev/null || fail "gcloud is not installed"
}

tell_cost() {
  local all=$((chips * slices))
  say "$slices × $type: $all chips, so $all chip-hours for each hour until you run"
  say "  $(quoted "$here/tpu_vm.sh" delete --name "$name" "${where[@]}")"
  say "prices of a chip-hour by zone, spot and on demand: https://cloud.google.com/tpu/pricing"
}

# The state of the queued resource, or ABSENT.
state() {
  local said
  if [ -n "$dry_run" ]; then echo ABSENT; return; fi
  if said=$("${queue[@]}" describe "$name" "${where[@]}" --format 'value(state.state)' 2>&1); then
    echo "${said##*$'\n'}"
  elif [[ $said == *NOT_FOUND* ]]; then
    echo ABSENT
  else
    say "${said##*$'\n'}"
    return 1
  fi
}

create() {
  local nodes_wanted=(--node-id "$name") tier=()
  [ "$slices" = 1 ] || nodes_wanted=(--node-count "$slices" --node-prefix "$name")
  [ -z "$spot" ] || tier=(--spot)
  call "${queue[@]}" create "$name" "${where[@]}" "${nodes_wanted[@]}" --accelerator-type "$type" \
    --runtime-version "$runtime" ${tier[@]+"${tier[@]}"}
}

delete() { call "${queue[@]}" delete "$name" "${where[@]}" --force --quiet; }

# Until the slice is there; what was taken away is made anew, once.
have_slice() {
  local found last='' made=''
  while true; do
    found=$(state) || return 1
    [ "$found" = "$last" ] || say "$name: $found"
    last=$found
    case $found in
      ACTIVE) return ;;
      ABSENT)
        create || return 1
        made=yes
        [ -z "$dry_run" ] || return 0
        continue
        ;;
      SUSPENDED | FAILED)
        [ -z "$made" ] || { say "$name: the request failed; \`status\` says why"; return 1; }
        delete || return 1
        ;;
    esac
    sleep "$poll"
  done
}

# The wheel, this folder's programs and the configuration, in echovlm/ on every worker. Steps are
# joined by &&: within `||` the shell does not stop at the first that fails.
install() {
  local version built=$wheel
  if [ -z "$built" ]; then
    version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/../pyproject.toml")
    built=$scratch/echovlm_jax-$version-py3-none-any.whl
    call python3 -m pip wheel --quiet --no-deps --wheel-dir "$scratch" "$here/.." || return 1
  fi
  call cp "$config" "$scratch/config.py" \
    && call "${nodes[@]}" ssh "$name" "${target[@]}" --command 'mkdir -p echovlm/launch' \
    && call "${nodes[@]}" scp "$here/tpu_worker.sh" "$here/constraints.txt" "$scratch/config.py" \
      "$built" "$name:echovlm/" "${target[@]}" \
    && call "${nodes[@]}" scp "$here/train.py" "$here/join.py" "$name:echovlm/launch/" "${target[@]}" \
    && on_workers install "$(basename "$built")" ${data:+"$data"}
}

# One try on a slice that is there.
once() {
  [ -n "$installed" ] || install || return 1
  installed=yes
  on_workers start "$programs" --config config.py --workdir "$workdir" ${data:+--config.data=data} "$@" || return 1
  on_workers follow
}

run() {
  local code now tries=0 installed=''
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  tell_cost
  while true; do
    code=0
    have_slice || { code=1; break; }
    once "$@" || code=$?
    [ "$code" != 0 ] && [ "$code" != 2 ] && [ "$tries" -lt "$retry" ] || break
    now=$(state) || break
    if [ "$now" = ACTIVE ]; then # no preemption, or one that left the slice there
      case $code in
        69 | 75 | 137) ;; # a process was lost or hung; training was asked to stop; was killed
        *) break ;;
      esac
    fi
    [ "$now" = ACTIVE ] || installed=''               # its disks are gone
    tries=$((tries + 1))
    say "ended with $code; try $tries of $retry"
  done
  if [ -n "$delete_when_done" ]; then delete || say "not deleted: do it by hand"; else tell_cost; fi
  case $code in
    75) say "asked to stop: it has saved; the same command goes on" ;;
    69) say "a process was lost or hung: its line above names it; the same command goes on" ;;
  esac
  return "$code"
}

case $action in
  run) check_run; run "$@" ;;
  logs) on_workers follow ;;
  stop) on_workers stop ;;
  delete) delete ;;
  status) call "${queue[@]}" describe "$name" "${where[@]}" ;;
esac
