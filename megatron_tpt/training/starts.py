"""RUN/starts.jsonl: one line for each start of a run, with all that it was started with."""

import collections
import json
import socket

from megatron_tpt import platform
from megatron_tpt.config.load import to_yaml
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.provenance import STARTS, start_record


def record_start(recipe: Recipe, step: int) -> None:
    """Add this start, which continues after `step` steps, to RUN/starts.jsonl: time, command, resolved recipe,
    revision, packages, machines with their number of processes, variables of the job. All ranks call it."""
    hosts = collections.Counter(platform.gather_objects(socket.gethostname()))
    if platform.is_first_rank():
        line = start_record() | {"step": step, "processes": dict(hosts), "recipe": to_yaml(recipe)}
        with (recipe.run.output_dir / STARTS).open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
