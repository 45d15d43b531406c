#!/usr/bin/env bash
# From documents to a scored model on SLURM: each stage is a job that begins when the one before has succeeded.
#
#     slurm/pipeline.sh PIPELINE.env
#
# The file sets the variables below in bash, with paths from the root of the repository; slurm/cluster.env has those of
# your site. Stages that are done or in the queue are not submitted again: the same command resumes after a failure.
# Logs are in OUTPUT/logs. The jobs of `augment` and `evaluate` have no GPU of their own: told so (--executor slurm),
# they submit arrays of tasks, and wait for these.
#
#     OUTPUT=runs/pipeline                     everything that is made
#     DOCUMENTS=clean/                         what is thought about
#     TEACHER=Qwen/Qwen3-8B                    the model that thinks
#     AUGMENT=(--executor slurm --num-tasks 16 --gpus-per-task 1)
#     TOKENIZER=models/llama3.2-3b
#     PRETRAIN=(examples/tpt/mid_3b.yaml --training.init_from=checkpoints/llama3.2-3b)
#     CHATS=chats/                             conversations to fine-tune on
#     PACK=(--sequence-length 32768 --chat-template chat.jinja)
#     FINETUNE=(examples/tpt/sft_3b.yaml)
#     RL=(rl.yaml --data.train=[prompts/])     optional: reinforcement learning after fine-tuning
#     EVALUATE=(--benchmark tpt-reasoning --data-dir benchmarks --executor slurm --num-tasks 16 --gpus-per-task 1)
set -euo pipefail
if [[ $# -ne 1 ]]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
elif [[ ! -f $1 ]]; then
    echo "error: $1 is no file: give one with the variables that slurm/pipeline.sh alone shows" >&2
    exit 2
fi
AUGMENT=() PACK=() RL=() EVALUATE=()
# shellcheck source=/dev/null
source "$(realpath "$1")"
cd "$(dirname "$0")/.."
set -a # also SBATCH_...: sbatch reads them
# shellcheck source=slurm/cluster.env
source "${CLUSTER_ENV:-slurm/cluster.env}"
set +a
for name in OUTPUT DOCUMENTS TEACHER TOKENIZER PRETRAIN CHATS FINETUNE EVALUATE; do
    if [[ -z "${!name:-}" ]]; then
        echo "error: $1 does not set $name" >&2
        exit 2
    fi
done
mkdir -p "$OUTPUT/logs" "$OUTPUT/done" "$OUTPUT/jobs"
OUTPUT=$(realpath "$OUTPUT")
export LOGS=$OUTPUT/logs
queued=$(squeue --me --noheader --format=%A)

previous=
# stage NAME SBATCH_OPTION... -- SCRIPT ARGUMENT...
stage() {
    local name=$1 options=()
    shift
    while [[ $1 != -- ]]; do options+=("$1"); shift; done
    shift
    if [[ -e $OUTPUT/done/$name ]]; then
        echo "$name: done before"
        return
    fi
    local job
    job=$(cat "$OUTPUT/jobs/$name" 2>/dev/null || true)
    if [[ -n $job ]] && grep -qxF "$job" <<<"$queued"; then
        previous=$job
        echo "$name: job $job is in the queue"
        return
    fi
    if [[ -s $BAD_NODES ]]; then options+=("--exclude=$(paste -sd, "$BAD_NODES")"); fi
    if [[ -n $previous ]]; then options+=("--dependency=afterok:$previous" --kill-on-invalid-dep=yes); fi
    previous=$(DONE=$OUTPUT/done/$name sbatch --parsable --job-name="$name" --output="$LOGS/%x-%j.out" \
        "${options[@]}" "$@")
    previous=${previous%%;*} # without the name of the cluster
    echo "$previous" >"$OUTPUT/jobs/$name"
    echo "$name: job $previous"
}
tool() {
    local name=$1
    shift
    stage "$name" --nodes=1 --ntasks=1 --cpus-per-task="$CPUS_PER_TASK" -- slurm/tool.sbatch "$@"
}
train() {
    local name=$1
    shift
    local gpus=()
    ((GPUS_PER_NODE == 0)) || gpus=(--gpus-per-node="$GPUS_PER_NODE")
    stage "$name" --nodes=$((NODES + SPARE_NODES)) --ntasks-per-node="$TASKS_PER_NODE" \
        --cpus-per-task="$CPUS_PER_TASK" "${gpus[@]}" -- slurm/train.sbatch "$@"
}

# First, as the shortest: broken conversations are found before anything long has begun.
tool pack tools/pack_sft.py --input "$CHATS" --tokenizer "$TOKENIZER" --output "$OUTPUT/index/chats" "${PACK[@]}"
tool augment tools/augment.py --input "$DOCUMENTS" --model "$TEACHER" --output "$OUTPUT/thinking" --wait "${AUGMENT[@]}"
tool index tools/index.py --input "$OUTPUT/thinking" --tokenizer "$TOKENIZER" --output "$OUTPUT/index/thinking"
train pretrain pretrain "${PRETRAIN[@]}" --run.output_dir="$OUTPUT/pretrain" --data.train="[$OUTPUT/index/thinking]"
train finetune finetune "${FINETUNE[@]}" --run.output_dir="$OUTPUT/finetune" --data.train="[$OUTPUT/index/chats]" \
    --training.init_from="$OUTPUT/pretrain/checkpoints/latest"
trained=finetune suffix=
if ((${#RL[@]} > 0)); then
    train rl rl "${RL[@]}" --run.output_dir="$OUTPUT/rl" --training.init_from="$OUTPUT/finetune/checkpoints/latest"
    trained=rl suffix=-rl # its model and scores are beside those of the fine-tuned one, where these were made before
fi
tool "export$suffix" tools/export_hf.py --checkpoint "$OUTPUT/$trained/checkpoints/latest" \
    --output "$OUTPUT/model$suffix"
tool "evaluate$suffix" tools/evaluate.py --model "$OUTPUT/model$suffix" --output "$OUTPUT/evaluation$suffix" --wait \
    "${EVALUATE[@]}"
echo "follow them: squeue --me; logs in $OUTPUT/logs; scores in $OUTPUT/evaluation$suffix"
