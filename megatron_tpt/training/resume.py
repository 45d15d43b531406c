"""Whether a run resumes from a checkpoint with this recipe: what is refused, and what is told.

The trainer asks it when it resumes; `--dry-run` asks it before anything is started.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_tpt.config.load import read_yaml, to_dict
from megatron_tpt.config.model import ModelConfig
from megatron_tpt.config.recipe import FinetuneRecipe, PretrainRecipe, Recipe
from megatron_tpt.errors import UserError
from megatron_tpt.indexing.manifest import TokenizerInfo
from megatron_tpt.training.checkpoint_files import checkpoints_to_read, damage_of_files

# Fields of a model that neither its tensors nor its function depend on.
_WITHOUT_CONSEQUENCE = {"preset", "init_std", "transformer_impl", "max_position_embeddings", "vocab_size"}
# Settings without which a checkpoint's optimizer state does not load; of the layout for dp_reshardable alone.
_OF_OPTIMIZER = (("optimizer", "name"), ("parallel", "distributed_optimizer"))
_OF_LAYOUT = (
    ("parallel", "tensor_parallel_size"),
    ("parallel", "pipeline_parallel_size"),
    ("parallel", "virtual_pipeline_parallel_size"),
)


def run_identity(recipe: Recipe, of_data: dict[str, str]) -> dict[str, Any]:
    """What decides the samples of the steps done; with another value of it some would be repeated or skipped on
    resuming. `of_data` is what TrainingData.identity says of them."""
    training = recipe.training
    return {
        "run.seed": recipe.run.seed,
        "training.sequence_length": training.sequence_length,
        "training.global_batch_size": training.global_batch_size,
        "training.batch_size_ramp": to_dict(training.batch_size_ramp),
        **of_data,
    }


def require_same_data(recipe: Recipe, folder: Path, state: dict[str, Any], of_data: dict[str, str]) -> str | None:
    """Raise UserError when this recipe's data does not continue where the checkpoint's ended; a warning where it is
    other data and data.allow_change permits it. `state` is the trainer's state in the checkpoint."""
    if state["step"] > recipe.training.num_steps:
        raise UserError(
            f"{folder} is beyond training.num_steps={recipe.training.num_steps}: raise it, or start in another "
            f"run.output_dir"
        )
    identity = run_identity(recipe, of_data)
    changed = [name for name, value in identity.items() if state["data"].get(name) != value]
    if not changed:
        return None
    is_of_data = isinstance(recipe, PretrainRecipe) and set(changed) <= of_data.keys()
    if is_of_data and isinstance(recipe, PretrainRecipe) and recipe.data.allow_change:
        return (
            f"with other training data, shares or steps (data.allow_change) than {folder} had, a source that is read "
            f"more than once may come in another order: some documents more often, some less"
        )
    raise UserError(
        f"{folder} was written by a run with another {', '.join(changed)}: its data order cannot continue with this "
        f"recipe. Put it back, or start in another run.output_dir (training.init_from takes the weights)"
        + ("; --data.allow_change=true resumes all the same" if is_of_data else "")
    )


def model_changes(model: ModelConfig, folder: Path) -> list[str]:
    """Fields of the model that are not those of a checkpoint, as "norm_epsilon=0.01 (there 1e-05)"."""
    there = read_yaml(folder / "recipe.yaml").get("model") or {}
    here = to_dict(model)
    names = [name for name in here if name in there and name not in _WITHOUT_CONSEQUENCE]
    return [f"{name}={here[name]} (there {there[name]})" for name in names if here[name] != there[name]]


def _changed_shape(model: ModelConfig, folder: Path) -> str | None:
    """The first field that gives the tensors of a checkpoint another shape."""
    there = ModelConfig(
        **{
            name: value
            for name, value in (read_yaml(folder / "recipe.yaml").get("model") or {}).items()
            if name in to_dict(model)
        }
    )
    shapes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "query_groups", "kv_channels")
    parts = ("tie_embeddings", "qkv_bias", "attention_output_bias", "mlp_bias", "qk_norm")
    for name in (*shapes, *parts, "padded_vocab_size"):
        if getattr(model, name) != getattr(there, name):
            return f"model.{name} is {getattr(there, name)} there and {getattr(model, name)} here"
    return None


def _damage(folder: Path) -> str:
    """What is wrong with the files of a checkpoint, but for their content, which is not read; "" for nothing."""
    return "; ".join(damage_of_files(folder)[:4])


def _require_fit(recipe: Recipe, folder: Path) -> None:
    if wrong := _changed_shape(recipe.model, folder):
        raise UserError(f"{folder} has a model of another shape: {wrong}: change the section model")


def _require_same_settings(recipe: Recipe, folder: Path) -> None:
    """Raise UserError when the optimizer's state in a checkpoint does not load with this recipe."""
    there, here = read_yaml(folder / "recipe.yaml"), to_dict(recipe)
    is_fixed = (there.get("checkpoint") or {}).get("optimizer_sharding") == "dp_reshardable"
    for section, name in (*_OF_OPTIMIZER, *(_OF_LAYOUT if is_fixed else ())):
        value = (there.get(section) or {}).get(name, here[section][name])
        if value != here[section][name]:
            raise UserError(
                f"{folder} was written with {section}.{name}={str(value).lower()}: resume with that, or start in "
                f"another run.output_dir (training.init_from takes the weights)"
            )


def describe_start(
    recipe: PretrainRecipe | FinetuneRecipe,
    tokenizer: TokenizerInfo | None,
    data_identity: Callable[[int], dict[str, str]] | None,
) -> Iterator[str]:
    """Where a run would start, and what would be told then, one line each; nothing is loaded.

    Raises UserError with what would be refused. `data_identity` is TrainingData.identity, None where the data is not
    here.
    """
    checkpoints = recipe.run.output_dir / "checkpoints"
    folders = checkpoints_to_read(checkpoints)[::-1]
    init_from = recipe.training.init_from
    if not folders and init_from is None:
        yield f"starts from random weights in {recipe.run.output_dir}"
    elif not folders:
        assert init_from is not None
        if damage := _damage(init_from):
            raise UserError(f"training.init_from={init_from} is damaged ({damage}): give another checkpoint")
        _require_fit(recipe, init_from)
        yield f"starts in {recipe.run.output_dir} from the weights of {init_from}"
    for folder in folders:
        if not (damage := _damage(folder)):
            yield from _describe_resumption(recipe, folder, tokenizer, data_identity)
            return
        yield f"WARNING: {folder} is damaged ({damage}): it would be set aside"
    if folders:
        raise UserError(f"no checkpoint in {checkpoints} is whole: put back what is missing, or delete them")


def _describe_resumption(
    recipe: PretrainRecipe | FinetuneRecipe,
    folder: Path,
    tokenizer: TokenizerInfo | None,
    data_identity: Callable[[int], dict[str, str]] | None,
) -> Iterator[str]:
    _require_fit(recipe, folder)
    _require_same_settings(recipe, folder)
    _require_tokenizer(folder, tokenizer)
    from megatron_tpt.training.checkpoint import read_trainer_state

    state = read_trainer_state(folder)
    if data_identity is not None:
        of_data = data_identity(recipe.training.num_samples(state["step"]))
        if warning := require_same_data(recipe, folder, state, of_data):
            yield f"WARNING: {warning}"
    if changes := model_changes(recipe.model, folder):
        yield f"WARNING: the model is not that of {folder}: {', '.join(changes)}"
    left = recipe.training.num_steps - state["step"]
    yield f"resumes from {folder}: {left} of {recipe.training.num_steps} steps are left" + (
        "" if left else "; nothing is left to do: raise training.num_steps to train further"
    )


def _require_tokenizer(folder: Path, tokenizer: TokenizerInfo | None) -> None:
    from megatron_tpt.indexing.tokenizer import is_of_other_tokenizer

    if tokenizer is not None and is_of_other_tokenizer(folder, tokenizer.fingerprint):
        raise UserError(
            f"{folder} was written by a run with another tokenizer: put back the data of that one, or start in another "
            f"run.output_dir"
        )
