"""Loads checkpoints under a layout and saves them from there.

`layout_worker.py TP PP FOLDER CHECKPOINT...` under torchrun writes FOLDER/NAME/latest for every one.
"""

import sys
from pathlib import Path

from megatron_tpt import platform
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.training import TrainingConfig
from megatron_tpt.interop.hf_export import read_model_config
from megatron_tpt.models.gpt.build import build_model
from megatron_tpt.training.checkpoint_loading import load_weights
from megatron_tpt.training.checkpoint_saving import save_checkpoint


def main() -> None:
    parallel = ParallelConfig(tensor_parallel_size=int(sys.argv[1]), pipeline_parallel_size=int(sys.argv[2]))
    target, *sources = map(Path, sys.argv[3:])
    with platform.process_groups(parallel):
        for source in sources:
            platform.seed_everything(0)
            gpt = build_model(read_model_config(source), parallel, TrainingConfig(dtype="float32"), seed=1)
            load_weights(source, gpt)
            save_checkpoint(
                target / source.name / "step_00000001",
                gpt,
                None,
                {},
                recipe_yaml=(source / "recipe.yaml").read_text(),
                tokenizer_path=source / "tokenizer",
            )


if __name__ == "__main__":
    main()
