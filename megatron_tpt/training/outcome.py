"""The closing message of a finished run: its checkpoint, and the commands for the next steps."""

import os
import shlex
import shutil
import sys
from pathlib import Path

import megatron_tpt
from megatron_tpt.config.cli import console_name
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.indexing.pack_manifest import PackManifest
from megatron_tpt.models.spec import spec_of
from megatron_tpt.training.checkpoint_files import step_folder
from megatron_tpt.training.model_files import chat_template


def _shown(path: Path) -> str:
    """A path as one would type it in the current folder."""
    inside = path.is_absolute() and path.is_relative_to(Path.cwd())
    return shlex.quote(str(path.relative_to(Path.cwd()) if inside else path))


def _python() -> str:
    """The interpreter of this process, as one would type it."""
    found = shutil.which("python")
    # Links are not resolved: a virtual environment's interpreter is a link to the base interpreter.
    if found is not None and os.path.abspath(found) == os.path.abspath(sys.executable):
        return "python"
    return _shown(Path(sys.executable))


def _tool(name: str) -> str:
    script = Path(megatron_tpt.__file__).parents[1] / "tools" / f"{name}.py"
    if script.is_file():
        return f"{_python()} {_shown(script)}"
    name = console_name(name)  # an installation: next to its interpreter
    return name if shutil.which(name) else _shown(Path(sys.executable).with_name(name))


def _learned_chats(recipe: Recipe) -> bool:
    """Whether a run was trained on data rendered with a chat template, rather than on plain texts."""
    manifests = [PackManifest.read(prefix) for prefix in recipe.packed_prefixes()]
    # The loss mask "response" is also used for plain texts, whose only end token is the end-of-sequence token.
    return any(
        manifest.loss_mask != "response" or set(manifest.end_of_turn_ids) - {manifest.settings.eos_id}
        for manifest in manifests
    )


def _checkpoint(recipe: Recipe) -> Path:
    return step_folder(recipe.run.output_dir / "checkpoints", recipe.training.num_steps)


def _exported(recipe: Recipe) -> Path:
    return recipe.run.output_dir / f"hf_{_checkpoint(recipe).name}"


def can_be_exported(recipe: Recipe) -> bool:
    """Whether the family of the model has a Hugging Face counterpart."""
    return spec_of(recipe.model).hugging_face() is not None


def describe_outcome(recipe: Recipe, num_tokens: int) -> str:
    """The checkpoint of a run that has done all its steps, and the command that exports it where it can be."""
    checkpoint = _checkpoint(recipe)
    finished = f"finished: {recipe.training.num_steps} steps, {num_tokens:,} tokens; checkpoint: {checkpoint}"
    if not can_be_exported(recipe):
        return finished
    export = f"{_tool('export_hf')} --checkpoint {_shown(checkpoint)} --output {_shown(_exported(recipe))}"
    return f"{finished}\nnext, to export: {export}"


def evaluate_command(recipe: Recipe) -> str:
    """The command that evaluates the exported model. Words in capitals are placeholders for the user."""
    checkpoint = _checkpoint(recipe)
    chat = " --chat" if _learned_chats(recipe) and chat_template(checkpoint / "tokenizer") else ""
    results = _shown(recipe.run.output_dir / f"evaluation_{checkpoint.name}")
    return (
        f"then, to evaluate: {_tool('evaluate')} --model {_shown(_exported(recipe))} --data PROBLEMS.jsonl "
        f"--output {results}{chat}"
    )


def fine_tune_command(recipe: Recipe) -> str:
    """The command that fine-tunes the checkpoint. Words in capitals are placeholders for the user."""
    command = f"{_python()} -m megatron_tpt.finetune FINETUNE.yaml"
    lead = "or" if can_be_exported(recipe) else "next"
    return f"{lead}, to fine-tune: {command} --training.init_from={_shown(_checkpoint(recipe))}"
