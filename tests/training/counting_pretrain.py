"""Pre-training that counts, in RUN/gathers.json, how often the weights of a part of the model were gathered."""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from megatron_tpt import platform, pretrain  # noqa: F401  (Megatron Core is imported after the platform)

from megatron.core.distributed import param_and_grad_buffer

_gather = param_and_grad_buffer.dist_all_gather_func
_calls: list[int] = []


def _counted(output: Any, own: Any, **options: Any) -> Any:
    _calls.append(output.numel())
    return _gather(output, own, **options)


param_and_grad_buffer.dist_all_gather_func = _counted


def main() -> None:
    """Train as pretrain does."""
    _calls.clear()
    pretrain.main()
    run = Path(yaml.safe_load(Path(sys.argv[1]).read_text())["run"]["output_dir"])
    (run / "gathers.json").write_text(json.dumps(len(_calls)))
