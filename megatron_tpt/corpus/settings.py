"""The settings of a run, kept beside its output so that no other run is mixed in."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_tpt.corpus.options import PrepareOptions
from megatron_tpt.errors import UserError
from megatron_tpt.files import atomic_write, file_fingerprint
from megatron_tpt.records import Source, expand_inputs, source_fingerprint

FORMAT_VERSION = 1


def settings_path(output: Path) -> Path:
    """Where the settings of a run are."""
    return output / "prepare.json"


def make_settings(options: PrepareOptions, sources: Sequence[Source]) -> dict[str, Any]:
    """Everything that decides what the output holds. What only decides how fast it comes is left out."""
    settings = {name: value for name, value in asdict(options).items() if name not in ("output", "num_workers")}
    settings["input"] = [
        {"name": source.name, "fingerprint": source_fingerprint(source, len(sources))} for source in sources
    ]
    settings["decontaminate"] = [
        {
            "name": each.name,
            "columns": each.columns,
            "files": {str(path): file_fingerprint(path) for path in expand_inputs([each.path])},
        }
        for each in options.evaluation_sets()
    ]
    return {"format_version": FORMAT_VERSION} | settings


def check_output(output: Path, settings: dict[str, Any]) -> None:
    """Raise UserError when `output` holds something else than a run with these settings."""
    path = settings_path(output)
    if not path.exists():
        if any(output.glob("part-*")):
            raise UserError(f"{output}: has shards but no {path.name}; choose another --output")
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); choose another --output") from error
    differing = [name for name in {**settings, **before} if settings.get(name) != before.get(name)]
    if differing:
        changes = "; ".join(
            f"{name} was {_short(before.get(name))}, now {_short(settings.get(name))}" for name in differing
        )
        raise UserError(
            f"{output}: was begun with other settings ({changes}); set them back or choose another --output"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def write_settings(output: Path, settings: dict[str, Any]) -> None:
    """Note the settings of a run that begins."""
    if not settings_path(output).exists():
        with atomic_write(settings_path(output)) as temporary:
            temporary.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
