"""The data set card: what a folder of augmented records holds, for people and for the Hugging Face Hub.

Its YAML header names the shards, so that `datasets.load_dataset(FOLDER)` reads them and no other file of the folder.
"""

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from megatron_tpt.files import atomic_write
from megatron_tpt.markdown import code, inline, table
from megatron_tpt.names import shown_lines
from megatron_tpt.thinking.statistics import LengthStatistics, ThinkingStatistics

CARD_NAME = "README.md"
SHARDS = "part-*.jsonl.zst"

_MAX_LISTED = 20
_SIZES = [(1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M")]
_SIZES += [(1e8, "10M<n<100M"), (1e9, "100M<n<1B"), (1e10, "1B<n<10B"), (1e11, "10B<n<100B"), (1e12, "100B<n<1T")]

# `meta` has other keys in other records (the source's own among them): as JSON it needs no common type.
_FEATURES = [{"name": name, "dtype": "string"} for name in ("id", "text", "thinking")] + [
    {"name": "meta", "dtype": "json"}
]

_COLUMNS = """\
| column | what it is |
| --- | --- |
| `id` | the document's id, given or a hash of its content |
| `text` | the document |
| `thinking` | the thinking about it, without tags |
| `meta` | source, generator, prompt, sampling, finish reason, lengths in tokens, and more |
"""

_LOAD = """\
from datasets import load_dataset  # 4.7 or later, which reads `meta` as JSON

records = load_dataset("PATH_OF_THIS_FOLDER", split="train")"""


def write_card(
    output: Path, settings: dict[str, Any], statistics: ThinkingStatistics, missing: Sequence[str] = ()
) -> None:
    """Write OUTPUT/README.md: counts, rejects by reason, lengths, the settings of the run, how to load the data, and
    what is missing where the job has not finished."""
    with atomic_write(output / CARD_NAME) as temporary:
        temporary.write_text(card(settings, statistics, missing), encoding="utf-8")


def card(settings: dict[str, Any], statistics: ThinkingStatistics, missing: Sequence[str] = ()) -> str:
    """The card as Markdown with a YAML header."""
    header = {
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": SHARDS}]}],
        "dataset_info": {"features": _FEATURES},
        "size_categories": [_size_category(statistics.records)],
        "tags": ["synthetic", "thinking-augmented"],
        "task_categories": ["text-generation"],
    }
    if missing:
        del header["size_categories"]
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        "# Documents with thinking" + (" (incomplete)" if missing else ""),
        *([_incomplete(missing)] if missing else []),
        f"Each record is a document and the thinking about it that {_generator(settings)} wrote.",
        _COLUMNS.rstrip(),
        f"```python\n{_LOAD}\n```",
        "## Counts",
        _counts(statistics),
        *_rejects(statistics),
        "## Lengths in tokens of the generator",
        _lengths(statistics),
        "## Settings",
        f"```json\n{shown_lines(json.dumps(_shortened(settings), indent=2, ensure_ascii=False))}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _incomplete(missing: Sequence[str]) -> str:
    now = datetime.now(UTC).isoformat(sep=" ", timespec="minutes")
    return (
        f"**Incomplete** on {now}: {inline('; '.join(missing))}. The counts are those of the shards "
        "present at that time; the command that began this folder resumes it, and rewrites this page at its end."
    )


def _generator(settings: dict[str, Any]) -> str:
    return code(str(settings["model"])) if settings.get("model") else "a language model"


def _size_category(num_records: int) -> str:
    return next((name for limit, name in _SIZES if num_records < limit), "n>1T")


def _counts(statistics: ThinkingStatistics) -> str:
    document, thinking = statistics.document_tokens, statistics.thinking_tokens
    rows = [
        ("records", f"{statistics.records:,}"),
        ("thinking that was truncated at the limit", _with_share(statistics.truncated, statistics.records)),
        ("thinking that was rejected", _with_share(statistics.rejects.total(), _judged(statistics))),
        ("tokens in documents", f"{document.total:,}"),
        ("tokens of thinking", f"{thinking.total:,}"),
        ("document and thinking together, per document token", _ratio(document.total + thinking.total, document.total)),
        ("tokens in prompts", f"{statistics.prompt_tokens:,}"),
    ]
    if statistics.generator_s:
        rows.append(
            (
                "device hours of the generator (a server elsewhere is one device)",
                f"{statistics.generator_s / 3600:,.2f}",
            )
        )
    return table(("", "number"), rows)


def _rejects(statistics: ThinkingStatistics) -> list[str]:
    parts = []
    if statistics.rejects:
        judged = _judged(statistics)
        rows = [(reason, _with_share(number, judged)) for reason, number in statistics.rejects.most_common()]
        parts += ["## Rejected thinking by reason", table(("reason", "number"), rows)]
    if statistics.chunk_rejects:
        rows = [(reason, f"{number:,}") for reason, number in statistics.chunk_rejects.most_common()]
        parts += ["## Rejected thinking about chunks of documents by reason", table(("reason", "number"), rows)]
    return parts


def _judged(statistics: ThinkingStatistics) -> int:
    return statistics.records + statistics.rejects.total()


def _lengths(statistics: ThinkingStatistics) -> str:
    percents = (10, 50, 90, 99)
    named = (("documents", statistics.document_tokens), ("thinking", statistics.thinking_tokens))

    def row(name: str, lengths: LengthStatistics) -> list[str]:
        values = [lengths.mean, lengths.std, *map(lengths.percentile, percents)]
        return [name, *("-" if math.isnan(value) else f"{value:,.0f}" for value in values)]

    header = ["", "mean", "standard deviation", *(f"{percent}th percentile" for percent in percents)]
    return table(header, (row(name, lengths) for name, lengths in named))


def _with_share(number: int, whole: int) -> str:
    return f"{number:,} ({number / whole:.1%})" if whole else f"{number:,}"


def _ratio(number: int, whole: int) -> str:
    return f"{number / whole:.2f}" if whole else "-"


def _shortened(value: Any) -> Any:
    """`value` with only the first entries of long lists, as of thousands of input files."""
    if isinstance(value, dict):
        return {key: _shortened(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        rest = [f"... {len(value) - _MAX_LISTED:,} more"] if len(value) > _MAX_LISTED else []
        return [*map(_shortened, value[:_MAX_LISTED]), *rest]
    return value
