#!/usr/bin/env bash
# On the GPU machine: unpack what carry.sh made into /tmp/megatron-tpt-gpu, where gpu_figures.sh looks for it.
#
#   bash .gpu/receive.sh        (CARRIED=DIR for another place)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
target=${CARRIED:-/tmp/megatron-tpt-gpu}
(cd "$here" && sha256sum --quiet -c SHA256SUMS)
rm -rf "$target"
mkdir -p "$target"
python3 -c '
import sys, tarfile
tarfile.open(sys.argv[1], "r:xz").extractall(sys.argv[2], filter="data")' "$here/carried.tar.xz" "$target"
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$target/site" "$target"/wheels/*.whl
rm -rf "$target/wheels"
echo "receive: $target; now: bash benchmarks/gpu_figures.sh"
