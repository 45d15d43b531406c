"""Two controls of thinking, made from the demo's documents and the thinking about them.

python examples/tpt_controls/rewrite.py --input documents.jsonl --form rephrase --output FOLDER

rephrase      in the place of the thinking, the document once more, otherwise: every fact and no step, and as many
              tokens as a thinking has: A parcel leaves on Mon: f+7 e+2 d+3 c+4 b+2 a+6 days. Thu
interleave    of the output of tools/augment.py: the document as it is, each step of its thinking behind the leg that
              the step is about (`meta.chunks`, for tools/index.py --join interleaved)
"""

import itertools
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megatron_tpt.config.cli import parse, run
from megatron_tpt.config.fields import PositiveInt
from megatron_tpt.records import Record, read_records, write_records


@dataclass(frozen=True)
class RewriteOptions:
    """What to make of which records."""

    input: Path
    """Documents of the demo's language, or the output of tools/augment.py for them."""
    form: Literal["rephrase", "interleave"]
    """Which control to write."""
    output: Path
    """The folder for records.jsonl."""
    limit: PositiveInt | None = None
    """Only the first records."""


def rephrased(record: Record) -> Record:
    """With the document in another order in the place of its thinking."""
    legs, answer = re.findall(r"[a-f]\+\d", record.text), record.text.split()[-1]
    return replace(record, thinking=f"A parcel leaves on Mon: {' '.join(reversed(legs))} days. {answer}")


def interleaved(record: Record) -> Record:
    """With chunks that end behind each leg, in the document and in the thinking; as it is where the thinking does not
    have a step for each."""
    ends = [found.end() for found in re.finditer(r"[a-f]\+\d", record.text)]
    steps = [found.end() for found in re.finditer(r"[a-f]\+\d \w+", record.thinking or "")]
    if len(ends) != len(steps) or steps[-1] != len(record.thinking or ""):
        return record
    chunks = [{"text_end": text, "thinking_end": thinking} for text, thinking in zip(ends, steps, strict=True)]
    return replace(record, meta=record.meta | {"chunks": chunks})


def rewrite(options: RewriteOptions) -> None:
    """Write the records of a control."""
    form = {"rephrase": rephrased, "interleave": interleaved}[options.form]
    records = itertools.islice(read_records([options.input]), options.limit)
    write_records(options.output / "records.jsonl", map(form, records))


if __name__ == "__main__":
    run(lambda: rewrite(parse(RewriteOptions, description=__doc__)))
