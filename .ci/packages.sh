#!/usr/bin/env bash
# Installs where they are missing (Debian, Ubuntu): SLURM and MUNGE, of which the tests start a cluster of one node by
# themselves, bubblewrap, in which they run code that models wrote, and Chromium, which shows the pages that programs
# write.
set -euo pipefail
export PATH="$PATH:/usr/sbin"

install() {
    local sudo
    sudo=$([ "$(id -u)" = 0 ] || echo sudo)
    $sudo apt-get update
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y --no-install-recommends "$@"
}

has_any() {
    local name
    for name in "$@"; do command -v "$name" > /dev/null && return; done
    return 1
}

missing=()
{ command -v slurmctld && command -v slurmd && command -v sbatch; } > /dev/null || missing+=(slurm-wlm)
has_any munged || missing+=(munge)
has_any bwrap || missing+=(bubblewrap)
if ((${#missing[@]})); then install "${missing[@]}"; fi
# Apart from the others: Ubuntu has no such package, and needs google-chrome.
if ! has_any chromium google-chrome chromium-headless-shell; then
    install chromium-headless-shell fonts-dejavu-core ||
        echo "Chromium cannot be installed here: the tests of pages are skipped"
fi
