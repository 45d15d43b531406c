"""The settings of a corpus run: what decides what its output holds."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_tpt.corpus.options import PrepareOptions
from megatron_tpt.files import file_fingerprint
from megatron_tpt.jobs.settings import describe_inputs
from megatron_tpt.records import Source, expand_sources

FORMAT_VERSION = 1


def make_settings(options: PrepareOptions, path: Path, sources: Sequence[Source]) -> dict[str, Any]:
    """Everything that decides what the output holds. What only decides how fast it comes is not part of it. `path`:
    where the settings of the run are."""
    settings = {name: value for name, value in asdict(options).items() if name not in ("output", "num_workers")}
    settings["input"] = describe_inputs(path, sources)
    settings["decontaminate"] = [
        {
            "name": each.name,
            "columns": ",".join(each.columns),
            "files": {
                source.name: file_fingerprint(source.path) if source.path else None
                for source in expand_sources([each.location])
            },
        }
        for each in options.evaluation_sets()
    ]
    return {"format_version": FORMAT_VERSION} | settings
