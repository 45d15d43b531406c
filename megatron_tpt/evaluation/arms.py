"""Which models are evaluated, and recurrent ones at which depths."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.options import EvaluateOptions
from megatron_tpt.files import real_path
from megatron_tpt.generation import EarlyExit, check_model, load_model_config
from megatron_tpt.jobs.settings import read_settings


@dataclass(frozen=True)
class Arm:
    """A model at one depth."""

    model: str
    name: str
    """A short name of the model: the last parts of its path."""
    folder: Path
    """Its folder in the output."""
    recurrences: int | None = None
    """Iterations; None for a model that is not recurrent, and for one that a server runs."""
    early_exit: EarlyExit | None = None


def label(model: str, recurrences: int | None) -> str:
    """What a model at a depth is called in reports."""
    return model if recurrences is None else f"{model}, r = {recurrences}"


def plan_arms(options: EvaluateOptions) -> list[Arm]:
    """Every model at every depth. Raises UserError for a model that cannot be read, and where a depth or early exit is
    asked for, and no model has any."""
    arms, depths = [], options.depths()
    for model, folder in zip(options.model, model_folders(options.model, options.output), strict=True):
        default = None
        if options.engine != "endpoint":
            check_model(model)
            default = getattr(load_model_config(model), "num_recurrences", None)
        if default is None:
            arms.append(Arm(model, str(folder), folder))
        elif not depths:
            arms.append(Arm(model, str(folder), folder, default, options.early_exit()))
        else:
            arms += [Arm(model, str(folder), folder / f"r{r}", r, options.early_exit()) for r in depths]
    if all(arm.recurrences is None for arm in arms) and (depths or options.early_exit()):
        option = "--recurrences" if depths else "--exit-criterion"
        raise UserError(f"{option} is for recurrent models, and {', '.join(options.model)} is none: omit it")
    return arms


def model_folders(models: Sequence[str], output: Path | None = None) -> list[Path]:
    """A folder for each model in the output: the one that has its answers; else the last parts of its path, as many as
    distinguish it from the others.

    Raises UserError for a model that is named twice.
    """
    parts = [_parts(model) for model in models]
    if len(set(parts)) < len(parts):
        raise UserError("a model is named twice; name each once")

    def folder(model: str, own: tuple[str, ...]) -> Path:
        ends = [own[-length:] for length in range(1, len(own) + 1)]
        before = (Path(*end) for end in ends if output is not None and _has_answers(output / Path(*end), model))
        new = (Path(*end) for end in ends if sum(other[-len(end) :] == end for other in parts) == 1)
        return next(before, None) or next(new, Path(*own))

    return [folder(model, own) for model, own in zip(models, parts, strict=True)]


def _parts(model: str) -> tuple[str, ...]:
    """The parts of a model's path, or of a name, that may be those of a folder inside another."""
    path = Path(model).resolve() if Path(model).exists() else Path(model)
    return tuple(part for part in path.parts if part not in (path.anchor, ".."))


def _has_answers(folder: Path, model: str) -> bool:
    """Whether a folder in the output is that of `model`."""
    settings = (read_settings(path) for path in (*folder.glob("*/settings.json"), *folder.glob("r*/*/settings.json")))
    names = (each["model"].get("name") for each in settings if each and isinstance(each.get("model"), dict))
    return any(isinstance(name, str) and is_same_model(name, model) for name in names)


def is_same_model(first: str, second: str) -> bool:
    """Whether two names are of one model: the same, or paths of one folder."""
    return first == second or (Path(first).is_dir() and real_path(first) == real_path(second))
