"""Expands the short forms of training data in a recipe: prefixes, wildcards, files with lists of sources."""

import glob
from pathlib import Path
from typing import Any

from megatron_tpt.config.convert import expand_path, from_yaml
from megatron_tpt.config.data import DatasetSource
from megatron_tpt.config.yaml_file import load_yaml
from megatron_tpt.errors import UserError
from megatron_tpt.indexing.shard_sets import require_whole_sets
from megatron_tpt.json_data import read_json

_LIST_SUFFIXES = (".yaml", ".yml", ".json")


def spell_out_sources(data: dict[str, Any]) -> None:
    """Replace every source in the section `data` of a recipe by mappings with one prefix each."""
    for section in [data, *(phase for phase in data.get("phases") or [] if isinstance(phase, dict))]:
        for split in ("train", "validation"):
            if section.get(split) is not None:
                section[split] = _spell_out(section[split])


def _spell_out(items: Any, inside: tuple[Path, ...] = ()) -> Any:
    """Prefixes and mappings as a list of mappings; anything else unchanged, to be refused later. `inside`: the nested
    list files that contain the items."""
    if isinstance(items, str):
        items = [items]
    if not isinstance(items, list):
        return items
    result: list[Any] = []
    for item in items:
        item = {"path": item} if isinstance(item, str) else item
        if isinstance(item, dict) and isinstance(item.get("path"), str):
            item = item | {"path": str(expand_path(item["path"]))}
        path = str(item.get("path", "")) if isinstance(item, dict) else ""
        if path.endswith(_LIST_SUFFIXES):
            result += _scaled(_spell_out(*_read_list(Path(path), inside)), item)
        elif glob.has_magic(path):
            result += _scaled(_matches(path), item) or [item]  # without a match it is refused where data is opened
        else:
            result.append(item)
    return result


def _read_list(path: Path, inside: tuple[Path, ...]) -> tuple[list[Any], tuple[Path, ...]]:
    """The items of a list file, and the nested list files that contain them. Raises UserError with all mistakes."""
    if path in inside:
        raise UserError(f"data: {path} is a list of sources that has itself among them: remove it there")
    try:
        content, places = load_yaml(path)  # JSON is YAML
    except OSError as error:
        raise UserError(f"data: {path}: {error.strerror}: give a prefix, or a file with a list of sources") from None
    if not isinstance(content, list) or not all(isinstance(item, str | dict) for item in content):
        raise UserError(f"data: {path} must hold a list of sources: prefixes, or {{path: PREFIX, weight: 1.0}}")
    from_yaml(list[DatasetSource], content, places, path)  # raises
    return content, (*inside, path)


def _matches(pattern: str) -> list[dict[str, Any]]:
    """The indices whose prefix matches, weighted by their tokens, under the name of the pattern."""
    manifests = sorted(Path(path) for path in glob.glob(f"{pattern}.json"))
    require_whole_sets([path.with_suffix("") for path in manifests], pattern, ".json")
    return [
        {"path": str(path.with_suffix("")), "weight": tokens, "name": Path(pattern).name}
        for path in manifests
        if (tokens := _num_tokens(path)) is not None
    ]


def _num_tokens(manifest: Path) -> int | None:
    """Tokens of an index; None for a JSON file that is not a manifest."""
    try:
        return read_json(manifest)["counts"]["tokens"]
    except (ValueError, KeyError, TypeError):
        return None


def _scaled(sources: list[dict[str, Any]], item: dict[str, Any]) -> list[dict[str, Any]]:
    """The sources that an item expands to, which share its weight and inherit its other settings."""
    total = sum(float(source.get("weight", 1.0)) for source in sources) or 1.0
    others = {key: value for key, value in item.items() if key not in ("path", "weight")}
    weight = float(item.get("weight", 1.0)) / total
    return [{**source, "weight": weight * float(source.get("weight", 1.0)), **others} for source in sources]
