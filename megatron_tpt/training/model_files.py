"""The files of a model that a checkpoint keeps besides the weights, passed on from run to run and to exports.

    tokenizer/               the tokenizer of the data, with the chat template
    generation_config.json   Hugging Face's: the tokens that end a completion, defaults of sampling
    hf_config.json           config.json of the model that was imported
    history.json             facts about the runs behind this checkpoint that an export needs

A run takes the last three from the checkpoint it resumes or starts from. Fine-tuning adds the tokens that end a turn of
its data.
"""

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_tpt.config.convert import from_json
from megatron_tpt.config.fields import TokenId
from megatron_tpt.config.load import read_yaml
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.errors import UserError
from megatron_tpt.indexing.pack_manifest import PackManifest
from megatron_tpt.indexing.tokenizer import (
    CHAT_TEMPLATE,
    CONFIG,
    Tokenizer,
    load_backend,
    read_tokenizer_files,
    tokenizer_fingerprint,
)
from megatron_tpt.json_data import pretty, read_object

logger = logging.getLogger(__name__)

GENERATION_CONFIG = "generation_config.json"
HF_CONFIG = "hf_config.json"
HISTORY = "history.json"
_TOKENS_BY_ID = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "sequence_bias")


@dataclass(frozen=True)
class History:
    """Facts about the runs behind a checkpoint that its export needs."""

    longest_sequence: int = 0
    """The longest training.sequence_length; 0 when nothing was trained."""
    end_of_turn_ids: list[TokenId] = field(default_factory=list)
    """Tokens that end a turn in the chats of fine-tuning; those of the newest data first."""

    @classmethod
    def read(cls, checkpoint: Path) -> "History":
        """The history of a checkpoint. In one of an earlier version it only covers the run that wrote it."""
        try:
            if content := read_object(checkpoint / HISTORY):
                return from_json(cls, content)
            recipe = checkpoint / "recipe.yaml"
            training = (read_yaml(recipe).get("training") or {}) if recipe.is_file() else {}
            return cls(longest_sequence=int(training.get("sequence_length", 0)))
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{checkpoint}: its {HISTORY} or recipe.yaml is damaged ({error})") from None


def model_files(recipe: Recipe, tokenizer_path: Path | None, origin: Path | None) -> dict[str, bytes]:
    """The model files for the checkpoints of a run that resumes or starts from the checkpoint `origin`, if any: their
    contents by their names in the checkpoint's folder."""
    contents = _tokenizer_contents(recipe, tokenizer_path, origin)
    history = History.read(origin) if origin else History()
    new_ids = _end_of_turn_ids(recipe)
    history = replace(
        history,
        longest_sequence=max(history.longest_sequence, recipe.training.sequence_length),
        end_of_turn_ids=list(dict.fromkeys([*new_ids, *history.end_of_turn_ids])),
    )
    settings = {name: read_object(origin / name) if origin else {} for name in (GENERATION_CONFIG, HF_CONFIG)}
    if origin and tokenizer_path:
        settings = {name: _with_ids_of(tokenizer_path, origin, one) for name, one in settings.items()}
    if new_ids and tokenizer_path:
        ids = special_token_ids(settings[HF_CONFIG], tokenizer_path)
        generation = {**(settings[GENERATION_CONFIG] or without_none(ids))}
        ends = generation.get("eos_token_id")
        generation["eos_token_id"] = with_end_ids(ids["eos_token_id"] if ends is None else ends, new_ids)
        settings[GENERATION_CONFIG] = generation
    contents |= {name: pretty(one) for name, one in settings.items() if one}
    contents[HISTORY] = pretty(asdict(history))
    return contents


def without_none(ids: dict[str, Any]) -> dict[str, Any]:
    """The entries whose id is not None."""
    return {name: id for name, id in ids.items() if id is not None}


def special_token_ids(config: dict[str, Any], tokenizer: Path) -> dict[str, Any]:
    """bos_token_id, eos_token_id and pad_token_id from the config.json of an imported model, or else from the tokenizer
    of this folder. eos_token_id is always set."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: config[name] for name in names if name in config} if config else _ids_named_by(tokenizer)
    if ids.get("eos_token_id") is None:
        ids["eos_token_id"] = Tokenizer(tokenizer).eos_id
    return ids


def _ids_named_by(tokenizer: Path) -> dict[str, Any]:
    loaded = Tokenizer(tokenizer)
    return {f"{kind}_token_id": loaded.named_id(kind) for kind in ("bos", "pad")}


def with_end_ids(ends: int | list[int], new_ids: Iterable[int]) -> int | list[int]:
    """End tokens with `new_ids` prepended; `ends` itself, a number or a list, if it has all of them."""
    known = ends if isinstance(ends, list) else [ends]
    added = [id for id in dict.fromkeys(new_ids) if id not in known]
    return [*added, *known] if added else ends


def _end_of_turn_ids(recipe: Recipe) -> list[int]:
    manifests = {prefix: PackManifest.read(prefix) for prefix in recipe.packed_prefixes()}
    for prefix, manifest in manifests.items():
        if manifest.settings.chat_template is not None and not manifest.end_of_turn_ids:
            logger.warning(
                f"{PackManifest.path(prefix)} names no token that ends a turn, so an export may not stop "
                f"after its answers: pack again (tools/pack_sft.py) if an earlier version packed it, or end turns in "
                f"the chat template with a special token"
            )
    return list(dict.fromkeys(id for manifest in manifests.values() for id in manifest.end_of_turn_ids))


def chat_template(folder: Path) -> str | list[Any] | None:
    """The chat template of a tokenizer folder, in any of the forms in which transformers stores it; None if there is no
    template or no folder."""
    file = folder / CHAT_TEMPLATE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template: str | list[Any] | None = read_object(folder / CONFIG).get("chat_template")
    return template


def _tokenizer_contents(recipe: Recipe, tokenizer_path: Path | None, origin: Path | None) -> dict[str, bytes]:
    """The files of tokenizer/. If the data's tokenizer has no chat template, that of the packed data or of the
    checkpoint that the run resumes or starts from is added."""
    if tokenizer_path is None:
        return {}
    files = read_tokenizer_files(tokenizer_path)
    own = chat_template(tokenizer_path)
    of_data = [PackManifest.tokenizer_path(prefix) for prefix in recipe.packed_prefixes()]
    packed = [folder for folder in of_data if chat_template(folder)]
    start = [origin / "tokenizer"] if origin else []
    other = next((folder for folder in [*packed, *start] if chat_template(folder)), None)
    if not own and other:
        own = chat_template(other)
        if isinstance(own, str):
            files[CHAT_TEMPLATE] = own.encode()
        else:
            config = {**read_object(tokenizer_path / CONFIG), "chat_template": own}
            files[CONFIG] = pretty(config)
        logger.info(f"checkpoints keep the chat template of {other}: {tokenizer_path} has none")
    if differing := [folder for folder in packed if chat_template(folder) != own]:
        logger.warning(
            f"data was packed with the chat template of {differing[0]}, and checkpoints keep another: pack "
            f"all data with one template, and give the tokenizer folder that has it (data.tokenizer)"
        )
    return {f"tokenizer/{name}": content for name, content in files.items()}


def _with_ids_of(tokenizer: Path, origin: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a checkpoint with token ids mapped to another tokenizer by the names of the tokens."""
    before = origin / "tokenizer"
    if not settings or not (before / "tokenizer.json").is_file():
        return settings
    if tokenizer_fingerprint(before) == tokenizer_fingerprint(tokenizer):
        return settings
    old, new = map(load_backend, (before, tokenizer))

    def translate(value: Any) -> Any:
        if isinstance(value, list):
            return [id for id in map(translate, value) if id is not None]
        name = old.id_to_token(value) if isinstance(value, int) else None
        return None if name is None else new.token_to_id(name)

    result = {name: value for name, value in settings.items() if name not in _TOKENS_BY_ID}
    lost = [f"{name}={settings[name]}" for name in settings if name in _TOKENS_BY_ID and settings[name]]
    for name in [name for name in result if name.endswith("_token_id")]:
        result[name] = translate(settings[name])
        if settings[name] is not None and result[name] in (None, []):
            lost.append(f"{name}={settings[name]}")
            del result[name]
    if lost:
        logger.warning(f"{', '.join(lost)} of {origin} are not tokens of {tokenizer}: not kept")
    return result
