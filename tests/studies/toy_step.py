"""A step of the toy studies: writes a number that its arguments and the steps before it decide.

python toy_step.py NAME OUTPUT [--from OUTPUT ...] [--value X]

In the folder TOY_FOLDER, notes.txt gets a line whenever a step begins, a file "fail NAME:VALUE" lets it fail, and a
file "hold NAME" lets it wait until that is gone. The environment names it: a file that a command names is an input.
"""

import argparse
import hashlib
import json
import os
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("name")
parser.add_argument("output", type=Path)
parser.add_argument("--from", dest="before", nargs="*", default=[], type=Path)
parser.add_argument("--value", default="")
arguments = parser.parse_args()

folder = Path(os.environ["TOY_FOLDER"])
with open(folder / "notes.txt", "ab", buffering=0) as file:
    file.write(f"{arguments.name}:{arguments.value} {os.getpid()}\n".encode())
if (folder / f"fail {arguments.name}:{arguments.value}").exists():
    raise SystemExit("error: the shelf is empty")
while (folder / f"hold {arguments.name}").exists():
    time.sleep(0.02)
numbers = [json.loads((before / "result.json").read_text())["score"] for before in arguments.before]
text = f"{arguments.name} {arguments.value} {numbers}"
score = int(hashlib.sha256(text.encode()).hexdigest()[:4], 16) / 65535
arguments.output.mkdir(parents=True, exist_ok=True)
(arguments.output / "result.json").write_text(json.dumps({"score": score, "tokens": 100, "problems": 50}))
