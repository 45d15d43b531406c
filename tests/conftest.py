"""Shared by all tests."""

import os

# Two cores for everything: torch's threads would fight each other, and the figures of a run depend on their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
