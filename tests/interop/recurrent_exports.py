"""Retrofits of small models, exported, and loaded by this package's classes."""

from pathlib import Path
from typing import Any

import torch
import transformers

from megatron_tpt.interop.hf_export import export_hf
from megatron_tpt.interop.options import ExportOptions, RetrofitOptions
from megatron_tpt.interop.retrofit import retrofit
from megatron_tpt.models.spec import register_classes


def export_retrofit(source: Path) -> Path:
    """The export of a retrofit of a model of four layers: 1 + 2 + 1, a random adapter."""
    folder = source.with_name(f"{source.name}-recurrent-hf")
    if not folder.exists():
        retrofit(RetrofitOptions(source, checkpoint_of(folder), split="1,2,1", seed=3))
        export_hf(ExportOptions(checkpoint_of(folder), folder))
    return folder


def checkpoint_of(folder: Path) -> Path:
    """The checkpoint behind an export."""
    return folder.with_name(folder.name.removesuffix("-hf"))


def loaded(folder: Path) -> Any:
    """The model in fp32."""
    register_classes(models=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    return model.eval()


def padded(prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [1, s] as one batch with padding before them, and its attention mask."""
    width = max(prompt.shape[1] for prompt in prompts)
    rows = [torch.nn.functional.pad(prompt, (width - prompt.shape[1], 0)) for prompt in prompts]
    masks = [(torch.arange(width)[None] >= width - prompt.shape[1]).long() for prompt in prompts]
    return torch.cat(rows), torch.cat(masks)
