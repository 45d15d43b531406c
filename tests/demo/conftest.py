"""The demo's modules are next to its scripts, and so are those of the controls."""

import sys
from pathlib import Path

for name in ("demo", "tpt_controls"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / name))
