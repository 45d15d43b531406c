"""Model folders and their tokenizers: checks that end in one clear line, and loading."""

import contextlib
import functools
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError, failure, one_line
from megatron_tpt.generation.api import EngineError, EngineOptions, Failure, Prompt, ScoringRequest
from megatron_tpt.indexing.chat_program import ChatProgram, TemplateError
from megatron_tpt.indexing.tokenizer import check_settings, loading_failure
from megatron_tpt.models.spec import register_classes
from megatron_tpt.names import counted


def check_model(model: str) -> None:
    """Raise UserError unless `model` is a model folder or could be the id of a model on the Hub."""
    if not _is_folder(model):
        return
    folder = Path(model)
    if not (folder / "config.json").is_file():
        raise UserError(f"{model}: no config.json in this folder; a model is exported by tools/export_hf.py")
    _check_weights(folder)
    _check_tokenizer(folder)


def _is_folder(model: str) -> bool:
    """Whether `model` is a folder; if not, it could be an id on the Hub. Raises UserError where it is neither."""
    folder = Path(model)
    if folder.is_dir():
        return True
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model) and not folder.parent.is_dir():
        return False
    raise UserError(f"{model}: no such model folder; give a Hugging Face model folder or a Hub id (owner/name)")


def _check_tokenizer(folder: Path) -> None:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(f"{folder}: no tokenizer (tokenizer.json) in this folder; copy the one it was trained with")


def _check_weights(folder: Path) -> None:
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no weights (*.safetensors) in this folder")
    for file in files:
        try:
            with safe_open(file, framework="numpy"):  # reads the header, and knows by it how long the file must be
                pass
        except SafetensorError as error:
            raise UserError(f"{file}: damaged or truncated ({error}); export or fetch the model again") from error


def weight_shapes(model: str) -> dict[str, tuple[int, ...]]:
    """The tensors in `model`'s folder, or in the local copy of a model on the Hub."""
    from huggingface_hub import snapshot_download
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    folder = Path(model) if Path(model).is_dir() else Path(snapshot_download(model, local_files_only=True))
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def require_all_weights(model: str, known: Set[str], given: Set[str]) -> None:
    """Raise EngineError unless an update has `given` all weights of `model`, and no others."""
    if given != known:
        names = ", ".join(sorted(given ^ known)[:3])
        raise EngineError(
            f"the update lacks {counted(len(known - given), 'weight')} of {model} and has "
            f"{counted(len(given - known), 'weight')} unknown to it: {names}"
        )


def load_tokenizer(model: str) -> Any:
    """The Hugging Face tokenizer of `model`, a folder that may have nothing else, or a Hub id.

    Raises UserError where it is missing or names no EOS token.
    """
    if _is_folder(model):
        _check_tokenizer(Path(model))
    check_settings(Path(model))
    try:
        with quiet():
            from transformers import AutoTokenizer

            register_classes(models=False)
            tokenizer = AutoTokenizer.from_pretrained(model)
            tokenizer("")  # some settings of a wrong type are met here
    except Exception as error:  # foreign files may be anything
        raise loading_failure(Path(model), error) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f'{model}: its tokenizer names no EOS token; set "eos_token" in tokenizer_config.json')
    return tokenizer


def begin_ids(tokenizer: Any) -> list[int]:
    """The begin-of-sequence token, for tokenizers that put one before every text; else nothing."""
    ids = tokenizer("").input_ids
    return ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The token ids of a prompt; messages are shown to the model in its chat template.

    Raises UserError for messages when the model has no chat template.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt).input_ids
    if not prompt or not isinstance(prompt[0], Mapping):
        return list(prompt)  # type: ignore[arg-type]
    if tokenizer.chat_template is None:
        raise UserError("the model has no chat template; ask for plain completions, or use a chat model")
    return tokenizer(render_chat(tokenizer, prompt), add_special_tokens=False).input_ids  # type: ignore[arg-type]


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]], **variables: Any) -> str:
    """The text of messages in the tokenizer's chat template, with the generation prompt, as its `apply_chat_template`
    writes it, but within limits. Raises UserError for a template that refuses the messages or exceeds these."""
    try:
        program = _program(tokenizer.get_chat_template())
        given = {"tools": None, "documents": None, "add_generation_prompt": True, **tokenizer.special_tokens_map}
        return program.run(list(messages), given | variables).text
    except (ValueError, TemplateError, UserError) as error:
        raise UserError(f"{tokenizer.name_or_path}: {one_line(error)}") from error


_program = functools.lru_cache(maxsize=8)(ChatProgram)


def check_prompt(ids: Sequence[int], max_model_len: int) -> Failure | None:
    """The failure of a prompt that is empty or leaves no room for a completion."""
    if not ids:
        return Failure("bad_request", "the prompt is empty")
    if len(ids) >= max_model_len:
        return Failure("prompt_too_long", f"a prompt of {len(ids)} tokens, but the context is {max_model_len}")
    return None


def check_scoring(request: ScoringRequest, max_model_len: int | None) -> Failure | None:
    """The failure of a request for a likelihood that has none, or whose tokens do not fit together with one new
    token."""
    if not request.context:
        return Failure("bad_request", "the context is empty: a token's probability needs at least one token before it")
    if not request.continuation:
        return Failure("bad_request", "the continuation is empty")
    return check_prompt([*request.context, *request.continuation], max_model_len or sys.maxsize)


def load_model_config(model: str) -> Any:
    """The Hugging Face config of `model`'s text part. Raises UserError where it cannot be read."""
    check_model(model)
    try:
        with quiet():
            from transformers import AutoConfig

            register_classes(models=False)
            return AutoConfig.from_pretrained(model).get_text_config()
    except Exception as error:  # foreign files may be anything
        raise failure(f"{model}: its config.json cannot be loaded ({one_line(error)})", error) from error


def is_recurrent(options: EngineOptions) -> bool:
    """Whether the model is a recurrent one, by its config.json. Raises UserError where the options ask for a depth, and
    it is not."""
    if hasattr(load_model_config(options.model), "num_recurrences"):
        return True
    if options.num_recurrences is not None or options.early_exit is not None:
        name = "early exit" if options.num_recurrences is None else f"num_recurrences={options.num_recurrences}"
        raise UserError(
            f"{options.model}: not a recurrent model, so it has no number of recurrences to choose; omit {name}"
        )
    return False


def check_context(model: str, num_prompt_tokens: int, max_new_tokens: int) -> int:
    """The context that such a prompt and its completion need, in tokens.

    Raises UserError when it is more than `model` was made for.
    """
    needed = num_prompt_tokens + max_new_tokens
    config = load_model_config(model)
    context = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    is_extended = "factor" in rope  # vLLM knows how far; it checks for itself
    if context is not None and needed > context and not is_extended:
        raise UserError(
            f"{model}: its context is {context} tokens, but a prompt of {num_prompt_tokens} and "
            f"{max_new_tokens} new tokens need {needed}; lower --max-new-tokens or shorten the prompt"
        )
    return needed


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what vLLM and torch say at every start; VLLM_LOGGING_LEVEL=INFO shows vLLM's part."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name in ("torch.utils.cpp_extension", "vllm.triton_utils.importing"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
