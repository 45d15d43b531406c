#!/usr/bin/env bash
# Installs SLURM and MUNGE where they are missing (Debian, Ubuntu): the tests start a cluster of one node by themselves.
set -euo pipefail
export PATH="$PATH:/usr/sbin"
if ! { command -v slurmctld && command -v slurmd && command -v sbatch && command -v munged; } >/dev/null; then
    sudo=$([ "$(id -u)" = 0 ] || echo sudo)
    $sudo apt-get update
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y --no-install-recommends slurm-wlm munge
fi
