#!/usr/bin/env bash
# The whole way, by the documentation's commands: a released checkpoint is converted into a bucket,
# exams become a dataset, both stages train (a process is killed in a save), and what was trained
# goes back to Hugging Face's form, where PyTorch loads it and computes the same.
#
#   whole_way.sh CHECKOUT BUCKET     in an empty folder; `echovlm` on PATH, credentials and
#                                    AWS_ENDPOINT_URL in the environment, PyTorch for the last step
set -euo pipefail
checkout=$1 bucket=$2
export PYTHONPATH=$checkout
say() { printf '[%4d s] %s\n' "$SECONDS" "$*"; }
ln -s "$checkout/configs" "$checkout/launch" .

say "the first page: a checkpoint in the released form, pictures, a dataset"
python -m tests.pages "$checkout/docs/index.md"

say "convert"
echovlm convert EchoVLM/ "$bucket/echovlm-jax"
echovlm verify "$bucket/echovlm-jax"

small=(--config.seq_len=1024 --config.max_patches=1024 --config.allow_dropped=0.1)
alignment=(
  --config configs/alignment.py --workdir "$bucket/stage1"
  --config.model="$bucket/echovlm-jax" --config.data=exams/ "${small[@]}"
  --config.steps=6 --config.global_batch_size=8 --config.checkpoint_every=2
)

# Kills a process as soon as checkpoint N of stage 1 has objects and is not whole.
kill_in_save() {
  python - "$bucket/stage1/checkpoints/$1" "$2" <<'PYTHON'
import os, signal, sys
from echovlm_jax.storage.files import as_path

folder, process = as_path(sys.argv[1]), int(sys.argv[2])
while not (names := folder.below()):
    os.kill(process, 0)  # fails where it has ended
os.kill(process, signal.SIGKILL)
sys.exit("XXH128SUMS" in names)
PYTHON
}

say "alignment on 2 processes of 4 devices; one is killed while it saves"
python launch/local_processes.py --processes 2 --devices 4 -- \
  launch/train.py "${alignment[@]}" >first.log 2>&1 &
job=$!
trap 'kill "$job" 2>/dev/null || true' EXIT
until grep -q 'training from step' first.log 2>/dev/null; do
  kill -0 "$job" 2>/dev/null || { say "training did not begin"; exit 1; }
  sleep 0.2
done
victim=$(pgrep -P "$job" | tail -n 1)
kill_in_save 4 "$victim" || { say "no save of step 4 was seen that was not whole"; exit 1; }
if wait "$job"; then say "a job that lost a process ended well"; exit 1; fi
trap - EXIT
say "killed; the same run goes on with 4 processes of 2 devices"
python launch/local_processes.py --processes 4 --devices 2 -- \
  launch/train.py "${alignment[@]}" >second.log 2>&1 || { tail -n 30 second.log; exit 1; }
grep -q 'training from step 2 to 6' second.log
echovlm verify "$bucket/stage1"

say "instruction"
echovlm train --config configs/instruction.py --workdir "$bucket/stage2" \
  --config.model="$bucket/stage1" --config.data=exams/ "${small[@]}" \
  --config.steps=2 --config.global_batch_size=1

say "evaluation"
echovlm eval "$bucket/stage2" --data exams/ --out "$bucket/results" --max-new-tokens 8 --limit 4

say "back to Hugging Face's form, and PyTorch"
echovlm export "$bucket/stage2" EchoVLM-tuned/ --merge-lora
python -m tests.golden.make_golden EchoVLM-tuned/ tuned.npz
echovlm parity EchoVLM-tuned/ --golden tuned.npz
say "done"
