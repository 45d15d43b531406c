"""Cut a pretrained model into prelude, recurrent layers and coda, as a checkpoint to start training from.

python tools/retrofit.py --model MODEL_DIR --split 4,8,4 --output CHECKPOINT_DIR
python tools/retrofit.py --model MODEL_DIR --split 4,8,4 --static --output BASELINE_DIR
torchrun -m megatron_tpt.pretrain RECIPE.yaml --training.init_from=CHECKPOINT_DIR
"""

from megatron_tpt.config.cli import parse, program
from megatron_tpt.interop.options import RetrofitOptions


def main() -> None:
    options = parse(RetrofitOptions, description=__doc__)
    from megatron_tpt.interop.retrofit import retrofit

    retrofit(options)


command = program(main)

if __name__ == "__main__":
    command()
