#!/usr/bin/env bash
# Installs SLURM and MUNGE where they are missing (Debian, Ubuntu), then runs the tests that need a real SLURM.
# The tests start a cluster of one node by themselves; no service has to be set up or running.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin"
if ! { command -v slurmctld && command -v slurmd && command -v sbatch && command -v munged; } >/dev/null; then
    sudo=$([ "$(id -u)" = 0 ] || echo sudo)
    $sudo apt-get update
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y --no-install-recommends slurm-wlm munge
fi
exec .venv/bin/python -m pytest tests/scale/test_slurm.py "$@"
