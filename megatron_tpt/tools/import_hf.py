"""Turn a Hugging Face model (Llama, Qwen2, Qwen3, OLMo-2) into a checkpoint to start training from, under any layout.

python tools/import_hf.py --model DIR --output CHECKPOINT_DIR
torchrun -m megatron_tpt.pretrain RECIPE.yaml --training.init_from=CHECKPOINT_DIR
"""

from megatron_tpt.config.cli import parse, program
from megatron_tpt.interop.options import ImportOptions


def main() -> None:
    options = parse(ImportOptions, description=__doc__)
    from megatron_tpt.interop.hf_import import import_hf

    import_hf(options)


command = program(main)

if __name__ == "__main__":
    command()
