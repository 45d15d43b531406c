"""The file of figures: written after every part, and what an earlier call wrote is not measured again."""

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tpt.files import write_json

FAILED = "failed"


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Figures by step and part."""
    found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    return found


def failures(parts: dict[str, Any]) -> list[str]:
    """The parts of a step that failed."""
    return [name for name, value in parts.items() if isinstance(value, dict) and FAILED in value]


@dataclass
class Record:
    """The parts of one step."""

    path: Path
    step: str

    def once(self, part: str, measure: Callable[[], Any]) -> Any:
        """What `measure` returns, or what it returned in an earlier call. A part that fails is written with its error:
        the next part comes after it, and another call tries it again."""
        parts = read(self.path).get(self.step, {})
        if part in parts and part not in failures(parts):
            return parts[part]
        begin = time.perf_counter()
        try:
            value = measure()
        except Exception as error:
            traceback.print_exc()
            value = {FAILED: f"{type(error).__name__}: {error}"[:2000]}
        print(f"{self.step}, {part}: {time.perf_counter() - begin:.1f} s: {json.dumps(value)[:300]}", flush=True)
        self.write(part, value)
        return value

    def write(self, part: str, value: Any) -> None:
        """Set one part."""
        figures = read(self.path)
        figures.setdefault(self.step, {})[part] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, figures, indent=1)
