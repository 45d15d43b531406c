"""The settings of a job, kept beside its output so that no other run is mixed in."""

import json
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.files import atomic_write


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Raise UserError when the folder of `path` holds something else than a run with these settings."""
    output = path.parent
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; give a folder for the output")
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


def write_settings(path: Path, settings: dict[str, Any]) -> None:
    """Note the settings of a run that begins in `path`, unless they are there."""
    if not path.exists():
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
