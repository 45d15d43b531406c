#!/usr/bin/env bash
# Installs where they are missing (Debian, Ubuntu): SLURM and MUNGE, of which the tests start a cluster of one node by
# themselves, bubblewrap, in which they run code that models wrote, Chromium, which shows them the pages that programs
# write, and shellcheck.
set -euo pipefail
export PATH="$PATH:/usr/sbin"
missing=()
{ command -v slurmctld && command -v slurmd && command -v sbatch; } > /dev/null || missing+=(slurm-wlm)
command -v munged > /dev/null || missing+=(munge)
command -v bwrap > /dev/null || missing+=(bubblewrap)
{ command -v chromium || command -v google-chrome || command -v chromium-headless-shell; } > /dev/null ||
    missing+=(chromium-headless-shell fonts-dejavu-core)
command -v shellcheck > /dev/null || missing+=(shellcheck)
if ((${#missing[@]})); then
    sudo=$([ "$(id -u)" = 0 ] || echo sudo)
    $sudo apt-get update
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y --no-install-recommends "${missing[@]}"
fi
