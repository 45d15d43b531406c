"""Train the demo's teacher by the project's own recipe, export it, and measure how well it thinks.

python examples/demo/teacher.py --output runs/teacher     (`make teacher`)

Its training examples are documents wrapped as tools/augment.py wraps them, answered by a solver's steps. They are from
a part of the language that the demo never uses. The finished model folder is OUTPUT/model; examples/demo/teacher holds
one that was made by this script.
"""

from dataclasses import dataclass
from pathlib import Path

from language import TEACHERS_PARCELS, Parcel, sample_parcels
from tokenizer import make_tokenizer

from megatron_tpt.config.cli import parse, run
from megatron_tpt.errors import UserError
from megatron_tpt.files import write_json
from megatron_tpt.records import read_records, write_json_lines
from megatron_tpt.studies.commands import Commands
from megatron_tpt.thinking.prompts import EXPERT

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class TeacherOptions:
    """Where to train the teacher, and on how much."""

    output: Path
    """The folder to make: tokenizer/, data, the run, model/ and report.json. It must not exist."""
    num_examples: int = 20000
    """Documents with a solver's steps to train on."""
    num_checks: int = 500
    """Other documents, to measure the teacher on."""
    seed: int = 0
    """Decides which documents these are."""


def prompt(parcel: Parcel) -> str:
    """What the teacher reads; the tag that opens the thinking begins the response."""
    return EXPERT.text.format(document=parcel.document)


def response(parcel: Parcel) -> str:
    return f"<think>\n{parcel.thinking}\n</think>"


def train_teacher(options: TeacherOptions) -> None:
    output = options.output.resolve()
    if output.exists():
        raise UserError(f"{output}: exists; remove it or choose another --output")
    commands = Commands(output / "logs")
    parcels = sample_parcels(TEACHERS_PARCELS, options.num_checks + options.num_examples, options.seed)
    checks, examples = parcels[: options.num_checks], parcels[options.num_checks :]
    num_tokens = make_tokenizer(output / "tokenizer", [prompt(p) + response(p) for p in examples[:1000]])
    commands.say(f"tokenizer: {num_tokens} tokens")
    write_json_lines(output / "train.jsonl", ({"prompt": prompt(p), "response": response(p)} for p in examples))
    write_json_lines(output / "checks.jsonl", ({"text": p.document} for p in checks))
    commands.python(
        "train",
        "-m", "megatron_tpt.finetune", HERE / "teacher.yaml", f"--run.output_dir={output / 'run'}",
        f"--data.train=[{output / 'train.jsonl'}]", f"--data.tokenizer={output / 'tokenizer'}",
    )  # fmt: skip
    commands.python(
        "export",
        "tools/export_hf.py", "--checkpoint", output / "run/checkpoints/latest", "--output", output / "model",
    )  # fmt: skip
    commands.python(
        "augment",
        "tools/augment.py", "--input", output / "checks.jsonl", "--output", output / "checked", "--model",
        output / "model", "--max-new-tokens", "32",
    )  # fmt: skip
    report = measure(output / "checked", {p.document: p for p in checks})
    write_json(output / "report.json", report)
    commands.say(f"{report}; the teacher is in {output / 'model'}")


def measure(thoughts: Path, parcels: dict[str, Parcel]) -> dict[str, float]:
    """How many of the thoughts are right, word for word, and how many at least end on the right day."""
    pairs = [(record.thinking or "", parcels[record.text]) for record in read_records([thoughts])]
    return {
        "thoughts": len(pairs),
        "right": sum(thinking == parcel.thinking for thinking, parcel in pairs) / len(pairs),
        "right_day": sum(thinking.endswith(parcel.thinking[-3:]) for thinking, parcel in pairs) / len(pairs),
    }


if __name__ == "__main__":
    run(lambda: train_teacher(parse(TeacherOptions, description=__doc__)))
