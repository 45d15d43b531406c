"""The miniature's modules are next to its scripts, and so is the demo's tokenizer."""

import sys
from pathlib import Path

for name in ("front_loading_demo", "demo"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / name))
