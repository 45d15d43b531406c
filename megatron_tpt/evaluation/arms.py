"""Which models are evaluated, and recurrent ones at which depths."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.options import EvaluateOptions
from megatron_tpt.generation import EarlyExit, check_model, load_model_config


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
    for model, folder in zip(options.model, model_folders(options.model), strict=True):
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


def model_folders(models: Sequence[str]) -> list[Path]:
    """A folder for each model in the output: the last parts of its path, as many as distinguish it from the others.

    Raises UserError for a model that is named twice.
    """
    parts = [Path(model).resolve().parts[1:] if Path(model).exists() else Path(model).parts for model in models]
    if len(set(parts)) < len(parts):
        raise UserError("a model is named twice; name each once")

    def folder(own: tuple[str, ...]) -> Path:
        lengths = range(1, len(own))
        ends = (own[-length:] for length in lengths if sum(other[-length:] == own[-length:] for other in parts) == 1)
        return Path(*next(ends, own))

    return [folder(own) for own in parts]
