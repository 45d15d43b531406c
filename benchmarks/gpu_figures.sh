#!/usr/bin/env bash
# Half an hour on one GPU: ten steps in order of value, their figures in benchmarks/results/gpu.json as they come.
#
#   bash benchmarks/gpu_figures.sh                     all steps that are not done; again, it resumes
#   bash benchmarks/gpu_figures.sh --steps 3 losses    these alone, by number or name
#   bash benchmarks/gpu_figures.sh --dry               toy shapes on a CPU, in some minutes, in runs/gpu-dry
#   bash benchmarks/gpu_figures.sh --minutes 9 --output OUT/gpu.json
#
# 1 smoke, 2 kernels, 3 speed-8b, 4 speed-3b, 5 losses, 6 memory, 7 packed, 8 options, 9 checkpoints, 10 thinking:
# benchmarks/gpu/steps.py says what each measures. On a machine without a network carry what it needs there beforehand
# (benchmarks/gpu/carry.sh). PYTHON names the interpreter; .venv is used where it is there.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
site=${CARRIED:-/tmp/megatron-tpt-gpu}   # where receive.sh has put the packages and the index
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python3)}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
index=()
if [ -d "$site/site" ]; then PYTHONPATH=$root:$site/site; fi
if [ -f "$site/text/text.json" ]; then index=(--index "$site/text/text"); fi
# A machine without a network has no other interface.
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} PYTHONUNBUFFERED=1
exec "$python" -m benchmarks.gpu.figures "${index[@]}" "$@"
