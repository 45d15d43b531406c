"""From a recipe file and the command line to a checked recipe.

    recipe, arguments = load_recipe(PretrainRecipe, ["recipe.yaml", "--training.num_steps=50", "--dry-run"])

The YAML is read, dotted overrides are written into it, a model preset is filled in, and the result becomes dataclasses;
unknown keys and wrong types are refused by name. No torch is imported: a mistake is reported within a second.
"""

import copy
import dataclasses
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from megatron_tpt.config.layout import check_layout
from megatron_tpt.config.recipe import DataPhase, DatasetSource, FinetuneRecipe, PretrainRecipe, Recipe
from megatron_tpt.config.sources import spell_out_sources
from megatron_tpt.errors import UserError
from megatron_tpt.models.presets import PRESETS

USAGE = "RECIPE.yaml [--section.key=value ...] [--dry-run[=PROCESSES]] [--help]"


def _parser(cls: type) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False, usage=f"%(prog)s {USAGE}", description=cls.__doc__)
    parser.add_class_arguments(cls)
    return parser


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError when there is no file, no YAML or no mapping."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"recipe {path}: {error.strerror}: give the path of a YAML file") from None
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"recipe {path} must be a mapping of sections (model:, training:, ...)")
    return content


def _apply_override(raw: dict[str, Any], key: str, value: str) -> None:
    *sections, last = key.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise UserError(f"--{key}: {section} is not a section of the recipe")
    try:
        raw[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raw[last] = value


@dataclasses.dataclass
class Arguments:
    """What a training program was called with."""

    path: Path
    """The recipe file."""
    overrides: list[tuple[str, str]]
    """Dotted keys and their values, in their order."""
    dry_run: bool = False
    """Describe the run and start nothing."""
    num_processes: int | None = None
    """Processes the dry run is to assume; as few as the layout allows when not given."""


def _read_arguments(argv: Sequence[str]) -> Arguments:
    arguments = Arguments(Path(), [])
    paths, rest = [], list(argv)
    while rest:
        argument = rest.pop(0)
        key, has_value, value = argument[2:].partition("=")
        if not argument.startswith("--"):
            paths.append(argument)
        elif key == "dry-run":
            arguments.dry_run = True
            if has_value and not value.isdecimal():
                raise UserError(f"{argument}: the number of processes must be a whole number")
            arguments.num_processes = int(value) if has_value else None
        elif has_value:
            arguments.overrides.append((key, value))
        elif rest:
            arguments.overrides.append((key, rest.pop(0)))
        else:
            raise UserError(f"{argument} lacks its value: write {argument}=VALUE")
    if len(paths) != 1:
        raise UserError(f"expected one recipe file, got {len(paths)}: usage: {USAGE}")
    arguments.path = Path(paths[0])
    return arguments


def _fill_in_preset(raw: dict[str, Any]) -> None:
    model = raw.get("model")
    if not isinstance(model, dict) or model.get("preset") is None:
        return
    if model["preset"] not in PRESETS:
        raise UserError(f"model.preset={model['preset']} is not known: use one of {', '.join(sorted(PRESETS))}")
    raw["model"] = {**PRESETS[model["preset"]], **model}


def _take_shape_of_checkpoint(raw: dict[str, Any]) -> None:
    """A run that starts from a checkpoint takes over the checkpoint's model, but for the fields that it gives."""
    training = raw.get("training")
    if isinstance(training, dict) and training.get("init_from") is not None:
        folder = Path(str(training["init_from"]))
        if not (folder / "recipe.yaml").is_file():
            raise UserError(f"training.init_from={folder} is no checkpoint: give one like RUN/checkpoints/latest")
        raw["model"] = {**read_yaml(folder / "recipe.yaml").get("model", {}), **(raw.get("model") or {})}


def _take_lists(raw: dict[str, Any]) -> dict[str, Any]:
    """The sources and phases of data, parsed one by one and taken out: jsonargparse needs time as the square of a
    list's length, minutes for thousands of sources. What is no list of mappings stays, to be refused with the rest."""
    taken: dict[str, Any] = {}
    data = raw.get("data")
    if not isinstance(data, dict):
        return taken
    for split in ("train", "validation"):
        if _is_list_of_mappings(data.get(split)):
            taken[split] = [_parse(DatasetSource, item) for item in data.pop(split)]
    if _is_list_of_mappings(data.get("phases")):
        taken["phases"] = []
        for phase in data.pop("phases"):
            sources = phase.pop("train") if _is_list_of_mappings(phase.get("train")) else []
            parsed = _parse(DataPhase, phase)
            parsed.train = [_parse(DatasetSource, item) for item in sources] or parsed.train
            taken["phases"].append(parsed)
    return taken


def _is_list_of_mappings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


_cached_parser = functools.cache(_parser)


def _parse[T](cls: type[T], raw: dict[str, Any]) -> T:
    parser = _cached_parser(cls)  # type: ignore[arg-type]  # a class is hashable
    return cls(**parser.instantiate(parser.parse_object(raw)).as_dict())


def recipe_from_dict[R: Recipe](cls: type[R], raw: dict[str, Any]) -> R:
    """Dataclasses from nested mappings. Raises UserError that names an unknown key or a wrong type."""
    raw = copy.deepcopy(raw)
    _fill_in_preset(raw)
    _take_shape_of_checkpoint(raw)
    if cls is PretrainRecipe and isinstance(raw.get("data"), dict):
        spell_out_sources(raw["data"])
    elif isinstance(raw.get("data"), dict) and isinstance(raw["data"].get("train"), str):
        raw["data"]["train"] = [raw["data"]["train"]]
    parser = _parser(cls)
    try:
        lists = _take_lists(raw) if cls is PretrainRecipe else {}
        sections = parser.instantiate(parser.parse_object(raw)).as_dict()
    except UserError:
        raise
    except Exception as error:  # jsonargparse's own errors have several types
        raise UserError("recipe: " + " ".join(str(error).split())) from None
    if lists:
        sections["data"] = dataclasses.replace(sections["data"], **lists)
    return cls(**sections)


def load_recipe[R: Recipe](cls: type[R], argv: Sequence[str]) -> tuple[R, Arguments]:
    """The recipe that a training program's command line describes, and the command line.

    `--help` prints every field with its documentation and leaves with code 0.
    """
    if "--help" in argv or "-h" in argv:
        _parser(cls).print_help()
        raise SystemExit(0)
    arguments = _read_arguments(argv)
    raw = read_yaml(arguments.path)
    for key, value in arguments.overrides:
        _apply_override(raw, key, value)
    return recipe_from_dict(cls, raw), arguments


def to_dict(value: Any) -> Any:
    """A recipe (or a part of one) as plain mappings, lists and strings for YAML and JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [to_dict(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def to_yaml(recipe: Recipe) -> str:
    """The fully resolved recipe as YAML, which load_recipe reads back to the same recipe."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False)


def check(recipe: Recipe, world_size: int) -> None:
    """Refuse what cannot run: combinations of sections, and a layout that does not fit `world_size` processes.

    Raises UserError that says what to change.
    """
    training, optimizer = recipe.training, recipe.optimizer
    check_layout(recipe, world_size)
    decay_steps = optimizer.decay_steps or training.num_steps
    if optimizer.warmup_steps >= decay_steps:
        raise UserError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} must be below the {decay_steps} steps of the schedule"
        )
    if (optimizer.wsd_decay_steps or 0) > decay_steps - optimizer.warmup_steps:
        raise UserError(
            f"optimizer.wsd_decay_steps={optimizer.wsd_decay_steps} do not fit between the warm-up and the end of the "
            f"schedule ({decay_steps - optimizer.warmup_steps} steps): lower it"
        )
    if recipe.logging.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError("logging.wandb_project needs the package wandb: install it, or leave the project out")
    if isinstance(recipe, PretrainRecipe):
        _check_data(recipe)
    elif isinstance(recipe, FinetuneRecipe) and not recipe.data.train:
        raise UserError("data.train is empty: give the training data")


def _check_data(recipe: PretrainRecipe) -> None:
    data, training = recipe.data, recipe.training
    if not (data.train or data.phases or data.mock):
        raise UserError("data.train is empty: give the training data")
    if data.mock and recipe.model.vocab_size is None:
        raise UserError("data.mock has no tokenizer that decides it: give model.vocab_size")
    if data.reset_at_documents and recipe.parallel.context_parallel_size > 1:
        raise UserError("data.reset_at_documents does not go with parallel.context_parallel_size: turn one off")
    end = data.phases[-1].end_sample(training.sequence_length) if data.phases else None
    if end is not None and end < training.num_samples(training.num_steps):
        raise UserError(
            f"data.phases end after {data.phases[-1].until_tokens:,} tokens, and training.num_steps goes on for "
            f"{training.num_samples(training.num_steps) * training.sequence_length:,}: leave out the last until_tokens"
        )
