#!/usr/bin/env bash
# Create .venv-gpu: the package beside Transformer Engine, for a machine without a GPU. Called by `make gpu-rehearsal`.
#
#   GPU_VENV=DIR    another place for the environment
#   MAX_JOBS=2      compilers at once
#
# Builds transformer_engine_torch, whose files are C++ alone: 10 to 20 minutes on two cores, once; its wheel stays in the
# environment. Needs the network, a C++ compiler, and CUDA 13.0's headers (from pip where there is no toolkit).
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=$(realpath -m "${GPU_VENV:-.venv-gpu}")
pin() { grep -oP "^$1==\K\S+" requirements/gpu.txt; }
te=$(pin transformer-engine) torch=$(pin torch)

inputs=$(cat requirements/gpu.txt constraints.txt pyproject.toml benchmarks/gpu/setup.sh | sha256sum | cut -d' ' -f1)
if [ "$(cat "$venv/.ready" 2>/dev/null || true)" = "$inputs" ]; then
  echo "gpu/setup: $venv is up to date"
  exit 0
fi

if [ ! -x "$venv/bin/python" ]; then
  for python in ${PYTHON:-} python3.12 "$HOME"/.pyenv/versions/3.12.*/bin/python3.12 none; do
    if "$python" -c 'import sys, venv; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then break; fi
  done
  if [ "$python" = none ]; then
    echo "error: no Python 3.12 found, which the target has: install one, or name it: PYTHON=/path/to/python3.12" >&2
    exit 2
  fi
  echo "gpu/setup: making $venv with $python"
  "$python" -m venv "$venv"
fi
py=$venv/bin/python wheels=$venv/wheels
mkdir -p "$wheels"

# The pins of constraints.txt, but for torch and what it brings.
grep -vE '^(torch|triton|nvidia-|cuda-|transformer-engine|vllm)' constraints.txt >"$venv/constraints.txt"
install() { "$py" -m pip install --quiet --disable-pip-version-check --constraint "$venv/constraints.txt" "$@"; }
echo "gpu/setup: torch $torch (a large download)"
install "torch==$torch" setuptools wheel ninja pybind11
echo "gpu/setup: the package and its tests"
install --no-build-isolation --editable . pytest pytest-timeout

if ! ls "$wheels"/transformer_engine_torch-"$te"-*.whl >/dev/null 2>&1; then
  echo "gpu/setup: building transformer_engine_torch $te (10 to 20 minutes on two cores; $venv/build.log)"
  nvidia=$("$py" -c "import nvidia; print(list(nvidia.__path__)[0])")
  export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
  headers=$nvidia/cu13/include
  if [ ! -f "$CUDA_HOME/include/crt/host_defines.h" ]; then   # no toolkit: two more packages complete the headers
    install 'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-cccl==13.0.*'
    headers=$headers:$headers/cccl
    unset CUDA_HOME
    export NVTE_BUILD_USE_NVIDIA_WHEELS=1
  fi
  # Its expert-parallel part wants a newer NCCL than this torch brings.
  PATH=$venv/bin:$PATH CPLUS_INCLUDE_PATH=$headers:$nvidia/cudnn/include:$nvidia/nccl/include \
    NVTE_FRAMEWORK=pytorch NVTE_CUDA_ARCHS=90 NVTE_WITH_NCCL_EP=0 NVTE_PYTORCH_FORCE_BUILD=TRUE MAX_JOBS=${MAX_JOBS:-2} \
    nice -n 19 "$py" -m pip wheel -v --no-build-isolation --no-deps --no-cache-dir \
    --no-binary transformer_engine_torch -w "$wheels" "transformer_engine_torch==$te" >"$venv/build.log" 2>&1 ||
    { tail -40 "$venv/build.log" >&2; exit 1; }
fi
install "transformer-engine==$te" "transformer-engine-cu13==$te" "$wheels"/transformer_engine_torch-"$te"-*.whl
"$py" -c "import torch, transformer_engine.pytorch"
echo "$inputs" >"$venv/.ready"
echo "gpu/setup: done"
