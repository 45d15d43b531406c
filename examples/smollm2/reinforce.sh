#!/usr/bin/env bash
# REPRO's measure on a real model: along worked solutions of GSM8K, and in two iterations of GRPO.
#
#   examples/smollm2/reinforce.sh DATA_DIR OUTPUT_DIR
#
# DATA_DIR holds gsm8k_train.jsonl; fetch.sh gets SmolLM2-135M-Instruct. The result is OUTPUT_DIR/reinforce.md. Needs
# what run.sh does, and about 7 minutes on two cores. NUM_SOLUTIONS and NUM_PROBLEMS set other sizes.
set -euo pipefail
if [ $# -ne 2 ]; then
  sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
if [ ! -f "$1/gsm8k_train.jsonl" ]; then
  echo "error: $1/gsm8k_train.jsonl is missing: put it there (github.com/openai/grade-school-math, train.jsonl)" >&2
  exit 2
fi
data=$(realpath "$1") output=$(realpath -m "$2")
cd "$(dirname "$0")/../.."
python=.venv/bin/python
example=examples/smollm2
mkdir -p "$output"
unset OMP_NUM_THREADS  # make sets it to one; engines take a thread for each core

say() { printf '\n$ %s\n' "$*"; "$@"; }

[ -d "$output/model" ] || say $example/fetch.sh "$output"
[ -d "$output/imported" ] || say $python tools/import_hf.py --model "$output/model" --output "$output/imported"
[ -f "$output/process_rewards.json" ] || say $python $example/process_rewards.py --data "$data" --model "$output/model" \
  --checkpoint "$output/imported" --output "$output/process_rewards.json" --num-problems "${NUM_SOLUTIONS:-20}"
say $python $example/prepare.py --problems --data "$data" --limit "${NUM_PROBLEMS:-200}" --output "$output/problems.jsonl"
say $python -m torch.distributed.run --nproc-per-node 1 -m megatron_tpt.rl $example/reinforce.yaml \
  --run.output_dir="$output/reinforce" --training.init_from="$output/imported" --data.train="[$output/problems.jsonl]"
say $python $example/reinforce_report.py --output "$output"
