#!/usr/bin/env bash
# SmolLM2-135M cut into 10 prelude, 10 recurrent and 6 coda layers: validation losses against steps of healing at r = 1,
# 2 and 4, and those of the same layers without the loop.
#
#   examples/recurrence/smollm2.sh MODEL_DIR DATA_DIR OUTPUT_DIR
#
# MODEL_DIR is SmolLM2-135M or -Instruct, a Hugging Face folder. DATA_DIR holds gsm8k_train.jsonl and gsm8k_test.jsonl
# (github.com/openai/grade-school-math). An hour on two cores. Run again, it resumes where it stopped.
set -euo pipefail
if [ $# -ne 3 ]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
model=$(realpath "$1") data=$(realpath "$2") output=$(realpath -m "$3")
cd "$(dirname "$0")/../.."
python=.venv/bin/python
torchrun=("$python" -m torch.distributed.run --nproc-per-node 2)
example=examples/recurrence
export OMP_NUM_THREADS=1 PYTHONPATH="$PWD/$example${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$output"

say() { printf '\n$ %s\n' "$*"; "$@"; }

for part in train test; do
  [ -f "$output/index/$part.json" ] || say $python tools/index.py --input "$data/gsm8k_$part.jsonl" \
    --text-column question,answer --tokenizer "$model" --output "$output/index/$part"
done

[ -d "$output/start/recurrent" ] || say $python tools/retrofit.py --model "$model" --split 10,10,6 --adapter identity \
  --output "$output/start/recurrent"
[ -d "$output/start/static" ] || say $python tools/retrofit.py --model "$model" --split 10,10,6 --static \
  --output "$output/start/static"

heal() {
  local arm=$1
  shift
  say "${torchrun[@]}" -m megatron_tpt.pretrain $example/smollm2_heal.yaml --run.output_dir="$output/$arm" \
    --training.init_from="$output/start/$arm" --data.train="[$output/index/train]" \
    --data.validation="[$output/index/test]" "$@"
}
heal static "--callbacks={depth_losses:DepthLosses: {}}"
heal recurrent "--callbacks={depth_losses:DepthLosses: {recurrences: [1, 2, 4]}}" --model.mean_recurrences=4 \
  --model.backprop_recurrences=4 --model.depth_curriculum=1-sqrt --model.depth_curriculum_steps=100
say $python $example/smollm2_report.py --output "$output"
