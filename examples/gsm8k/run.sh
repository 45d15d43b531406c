#!/usr/bin/env bash
# The whole way on real documents: GSM8K's training problems to a small model that is asked GSM8K's test problems.
#
#   examples/gsm8k/run.sh DATA_DIR OUTPUT_DIR [TEACHER_DIR]
#
# DATA_DIR holds gsm8k_train.jsonl and gsm8k_test.jsonl (github.com/openai/grade-school-math). TEACHER_DIR is the model
# that thinks, a Hugging Face folder; by default the demo's. Run again, it resumes where it stopped.
set -euo pipefail
if [ $# -lt 2 ]; then
  sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
data=$(realpath "$1") output=$(realpath -m "$2")
cd "$(dirname "$0")/../.."
teacher=${3:-examples/demo/teacher}
num_augmented=500 num_problems=300
python=.venv/bin/python
torchrun=("$python" -m torch.distributed.run --nproc-per-node 2)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

say() { printf '\n$ %s\n' "$*"; "$@"; }

say $python examples/gsm8k/prepare.py --data "$data" --output "$output/data" --num-augmented $num_augmented

# Thinking about the first documents; the others stay plain. This teacher knows nothing of English: the filters would
# rightly reject its noise, and are off. Leave them on with a real one.
say $python tools/augment.py --input "$data/gsm8k_train.jsonl" --text-column question,answer \
  --limit "$num_augmented" --model "$teacher" --max-document-tokens 640 --max-new-tokens 256 --output "$output/augmented" \
  --filters.min-words 0 --filters.max-repeated-share 1 --filters.loop-words 0 --filters.max-foreign-share 1

[ -d "$output/tokenizer" ] || say $python tools/train_tokenizer.py --input "$data/gsm8k_train.jsonl" \
  --text-column question,answer --vocab-size 4096 --output "$output/tokenizer"

say $python tools/index.py --input "$output/augmented" --tokenizer "$output/tokenizer" --output "$output/index/augmented"
say $python tools/index.py --input "$output/data/plain.jsonl" --text-column question,answer \
  --tokenizer "$output/tokenizer" --output "$output/index/plain"
say $python tools/inspect_index.py "$output/index/augmented" --verify

say "${torchrun[@]}" -m megatron_tpt.pretrain examples/gsm8k/pretrain.yaml --run.output_dir="$output/pretrain" \
  --data.train="[{path: $output/index/augmented, weight: 0.1}, {path: $output/index/plain, weight: 0.9}]"
say "${torchrun[@]}" -m megatron_tpt.finetune examples/gsm8k/finetune.yaml --run.output_dir="$output/finetune" \
  --training.init_from="$output/pretrain/checkpoints/latest" --data.train="[$output/data/sft.jsonl]"

[ -d "$output/model" ] || say $python tools/export_hf.py --checkpoint "$output/finetune/checkpoints/latest" \
  --output "$output/model"
say $python tools/evaluate.py --model "$output/model" --data "$data/gsm8k_test.jsonl" --limit "$num_problems" \
  --prompt-template '{question}\n' --answer-type number --max-new-tokens 320 --output "$output/evaluation"
