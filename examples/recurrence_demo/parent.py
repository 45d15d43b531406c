"""Train the parent of the miniature by the project's own recipe, and export it.

python examples/recurrence_demo/parent.py --output runs/recurrence-parent     (`make recurrence-parent`)

The parent knows all walks of one and two doors, and no longer ones. The finished model folder is OUTPUT/model;
examples/recurrence_demo/parent holds one that was made by this script. report.json has its accuracy on walks of one and
two doors, which it was trained on, and on the problems.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from house import ROW_TOKENS, HouseOptions, write_house

from megatron_tpt.config.cli import parse, run
from megatron_tpt.errors import UserError
from megatron_tpt.files import write_json
from megatron_tpt.studies.commands import Commands

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class ParentOptions:
    """Where to train the parent."""

    output: Path
    """The folder to make: data/, tokenizer/, the run, model/ and report.json. It must not exist."""
    seed: int = 0
    """Decides the initial weights and the order of the data."""


def make_tokenizer(commands: Commands, walks: Path, folder: Path) -> None:
    """A tokenizer for which every room and every door is one token."""
    commands.python(
        "tokenizer",
        "tools/train_tokenizer.py", "--input", walks, "--text-column", "prompt", "--vocab-size", "512",
        "--output", folder,
    )  # fmt: skip


def pack(commands: Commands, walks: Path, tokenizer: Path) -> Path:
    """Tokenize a file of conversations, one in each row. Returns the prefix of the packed index."""
    prefix = walks.with_suffix("")
    commands.python(
        f"pack_{prefix.name}",
        "tools/pack_sft.py", "--input", walks, "--tokenizer", tokenizer, "--chat-template",
        HERE / "chat_template.jinja", "--output", prefix, "--sequence-length", str(ROW_TOKENS), "--num-workers", "1",
    )  # fmt: skip
    return prefix


def train(commands: Commands, run_folder: Path, packed: Path, seed: int, *overrides: str) -> Path:
    """Train a parent. Returns its checkpoint."""
    commands.python(
        run_folder.name,
        "-m", "megatron_tpt.finetune", HERE / "parent.yaml", f"--run.output_dir={run_folder}", f"--run.seed={seed}",
        f"--data.train=[{packed}]", *overrides,
    )  # fmt: skip
    return run_folder / "checkpoints/latest"


def make_parent(options: ParentOptions) -> None:
    """Everything, from the walks to the report."""
    output = options.output.resolve()
    if output.exists():
        raise UserError(f"{output}: exists; remove it or choose another --output")
    commands = Commands(output / "logs")
    data = output / "data"
    write_house(HouseOptions(data, seed=options.seed))
    make_tokenizer(commands, data / "short.jsonl", output / "tokenizer")
    packed = pack(commands, data / "atoms.jsonl", output / "tokenizer")
    checkpoint = train(commands, output / "run", packed, options.seed)
    commands.python("export", "tools/export_hf.py", "--checkpoint", checkpoint, "--output", output / "model")
    report = {}
    for name in ("short", "problems"):
        commands.python(
            f"measure_{name}",
            HERE / "measure.py", "--checkpoints", checkpoint, "--problems", data / f"{name}.jsonl",
            "--output", output / "accuracy" / name,
        )  # fmt: skip
        content = json.loads((output / "accuracy" / name / "accuracy.json").read_text(encoding="utf-8"))
        report[name] = content["results"][0]["accuracy"]["1"]
    write_json(output / "report.json", report)
    commands.say(f"solved by doors: {report}; the parent is in {output / 'model'}")


if __name__ == "__main__":
    run(lambda: make_parent(parse(ParentOptions, description=__doc__)))
