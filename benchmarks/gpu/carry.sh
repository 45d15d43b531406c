#!/usr/bin/env bash
# What a machine with a Hopper GPU, torch 2.11 for CUDA 13 and no network lacks, in .gpu/ (ignored by git; under 60 MiB).
#
#   make gpu-rehearsal && bash benchmarks/gpu/carry.sh
#   (there)  bash .gpu/receive.sh && bash benchmarks/gpu_figures.sh
#
# Transformer Engine with its core library cut down to sm_90, Megatron Core, the other wheels in WHEELS, and an index of
# real text. Needs the environment of `make gpu-rehearsal` (GPU_VENV), the network, and binutils' strip.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=$(realpath -m "${GPU_VENV:-.venv-gpu}") out=$PWD/.gpu
pin() { { grep -hoP "^$1==\K\S+" requirements/gpu.txt constraints.txt || true; } | head -1; }
# typing-extensions and typing-inspection may be there, but older than pydantic wants.
WHEELS="transformer-engine megatron-core pydantic pydantic_core annotated-types typing_extensions typing-inspection
        gigatoken emerging-optimizers orjson xxhash zstandard dill py3langid"
if [ ! -f "$venv/.ready" ]; then
  echo "error: $venv is not there or unfinished: run make gpu-rehearsal first" >&2
  exit 2
fi
py=$venv/bin/python work=$venv/carry te=$(pin transformer-engine)
rm -rf "$work" "$out"
mkdir -p "$work/pack/wheels" "$work/core" "$venv/downloads" "$out"

echo "carry: wheels"
for name in $WHEELS; do
  version=$(pin "$name")
  "$py" -m pip download -q --no-deps --only-binary=:all: -d "$venv/downloads" "$name==${version:?no pin of $name}"
  cp "$venv/downloads/${name//-/_}-$version"-*.whl "$work/pack/wheels/"
done
cp "$venv"/wheels/transformer_engine_torch-"$te"-*.whl "$work/pack/wheels/"
"$py" -m pip download -q --no-deps --only-binary=:all: -d "$venv/downloads" "transformer-engine-cu13==$te"
core=$(echo "$venv"/downloads/transformer_engine_cu13-"$te"-*.whl)

echo "carry: the core library for sm_90"
"$py" -m zipfile -e "$core" "$work/core"
strip --strip-unneeded "$work/core/transformer_engine/wheel_lib/libtransformer_engine.so"
PYTHONPATH=$PWD "$py" -m benchmarks.gpu.one_architecture "$work/core" "$work/pack/wheels/$(basename "$core")"

echo "carry: an index of real text"
PYTHONPATH=$PWD "$py" -m benchmarks.gpu.real_text --output "$work/pack/text"

tar -C "$work/pack" -c . | nice -n 19 xz -6 -T2 >"$out/carried.tar.xz"
cp benchmarks/gpu/receive.sh "$out/"
(cd "$out" && sha256sum carried.tar.xz >SHA256SUMS)
rm -rf "$work"
bytes=$(du -sb "$out" | cut -f1)
echo "carry: $out, $((bytes >> 20)) MiB"
if [ "$bytes" -gt $((60 << 20)) ]; then
  echo "error: $out is over 60 MiB: give real_text a smaller --num-bytes, or omit wheels that the target has" >&2
  exit 1
fi
