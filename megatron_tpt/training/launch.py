"""What the training programs do around training: check, describe, start the processes. No torch until they start."""

import bisect
import contextlib
import dataclasses
import glob
import math
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_tpt.config.effects import without_effect
from megatron_tpt.config.load import Arguments, check, read_yaml
from megatron_tpt.config.recipe import FinetuneRecipe, PretrainRecipe, Recipe
from megatron_tpt.errors import Fault, UserError, is_of_full_disk
from megatron_tpt.indexing.manifest import Manifest, TokenizerInfo, read_manifests
from megatron_tpt.indexing.packing import PackManifest, is_packed
from megatron_tpt.training.blend import blends, describe_data, with_data_of_run
from megatron_tpt.training.data_checks import data_warnings, is_all_packed
from megatron_tpt.training.describe import describe
from megatron_tpt.training.devices import find_device
from megatron_tpt.training.history import with_batches_of_run
from megatron_tpt.training.resume import describe_start
from megatron_tpt.training.run_lock import run_lock

# What gloo and NCCL say of it.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


def _read_tokenizer(folder: Path) -> TokenizerInfo:
    from megatron_tpt.indexing.tokenizer import Tokenizer

    return TokenizerInfo.of(Tokenizer(folder))


def data_tokenizer(recipe: PretrainRecipe | FinetuneRecipe, *, needs_data: bool = True) -> TokenizerInfo | None:
    """The tokenizer of a recipe's data; none for random tokens.

    Raises UserError when the data or the tokenizer is missing. Without `needs_data` that is fine, and there is none,
    when the recipe gives the size of the vocabulary.
    """
    try:
        if isinstance(recipe, FinetuneRecipe):
            return _read_tokenizer(recipe.tokenizer_path)
        if recipe.data.mock:
            return None
        sources = [source for phase in recipe.data.all_phases for source in phase.train] + recipe.data.validation
        return read_manifests([source.path for source in sources])[0].tokenizer
    except UserError:
        if needs_data or recipe.model.vocab_size is None:
            raise
        return None


def with_vocabulary[R: PretrainRecipe | FinetuneRecipe](recipe: R, tokenizer: TokenizerInfo | None) -> R:
    """The recipe with the vocabulary size of its data's tokenizer, where it gives none, or only that of a checkpoint to
    start from that has fewer tokens.

    Raises UserError when the tokenizer has more tokens than the model of the recipe.
    """
    model, start = recipe.model, recipe.training.init_from
    if tokenizer is None:
        return recipe
    before = _vocab_size_of(start) if start is not None else None
    if before is not None and model.vocab_size is not None and model.vocab_size < before:
        raise UserError(
            f"model.vocab_size={model.vocab_size} is smaller than that of training.init_from={start} ({before}), whose "
            f"last tokens would be lost: omit it"
        )
    grows = before is not None and model.vocab_size == before
    if model.vocab_size is None or (grows and model.vocab_size < tokenizer.vocab_size):
        return dataclasses.replace(recipe, model=dataclasses.replace(model, vocab_size=tokenizer.vocab_size))
    if model.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size={model.vocab_size} is smaller than the data's tokenizer ({tokenizer.vocab_size} tokens):"
            f" raise it, or omit it"
        )
    return recipe


def _vocab_size_of(checkpoint: Path) -> int | None:
    size: int | None = (read_yaml(checkpoint / "recipe.yaml").get("model") or {}).get("vocab_size")
    return size


def context_warnings(recipe: Recipe) -> list[str]:
    """What to say of sequences longer than the model is said to handle; nothing where they are not."""
    length, context = recipe.training.sequence_length, recipe.model.max_position_embeddings
    if length <= context:
        return []
    return [
        f"training.sequence_length={length} is above model.max_position_embeddings={context}: checkpoints are "
        f"exported with {length}; raise model.max_position_embeddings to agree, and model.rotary_base or the rope_ "
        f"fields where the model is to be stretched"
    ]


def _require_folder(recipe: PretrainRecipe, tokenizer: TokenizerInfo) -> None:
    """Raise UserError unless the tokenizer that checkpoints will keep is there, and is the data's."""
    folder = recipe.data.tokenizer or Path(tokenizer.path)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder}: the tokenizer of the data is not there, and checkpoints keep it: give its folder "
            f"(--data.tokenizer=FOLDER)"
        )
    found = _read_tokenizer(folder)
    for what, ours, theirs in (
        ("tokenizer.json", found.fingerprint, tokenizer.fingerprint),
        ("end-of-sequence token", found.eos_id, tokenizer.eos_id),
    ):
        if ours != theirs:
            raise UserError(
                f"{folder}: this is not the tokenizer of the data: its {what} is another. Give the folder of the one "
                f"that the data was indexed with (--data.tokenizer=FOLDER), or index again"
            )


def _require_tokenizer_of_weights(recipe: PretrainRecipe | FinetuneRecipe, tokenizer: TokenizerInfo) -> None:
    """Raise UserError when the weights to start from know other tokens than the data has."""
    from megatron_tpt.indexing.tokenizer import is_of_other_tokenizer

    folder = recipe.training.init_from
    if folder is None or recipe.training.allow_other_tokenizer:
        return
    if is_of_other_tokenizer(folder, tokenizer.fingerprint):
        raise UserError(
            f"training.init_from={folder} was trained with another tokenizer than that of the data ({tokenizer.path}): "
            f"make the data with {folder / 'tokenizer'}; or, where the tokens mean the same, give "
            f"--training.allow_other_tokenizer=true"
        )


def with_steps[R: PretrainRecipe | FinetuneRecipe](recipe: R) -> R:
    """The recipe with the number of steps that `training.num_epochs` asks for, where it does.

    The last step may reach into one more epoch. Raises UserError for data that is not packed.
    """
    if not isinstance(recipe, FinetuneRecipe) or recipe.training.num_epochs is None:
        return recipe
    if not is_packed(recipe.data.train):
        raise UserError(
            "training.num_epochs needs packed indices: pack data.train (tools/pack_sft.py), or give training.num_steps"
        )
    num_rows = sum(PackManifest.read(prefix).counts.rows for prefix in recipe.data.train)
    num_samples = math.ceil(num_rows * recipe.training.num_epochs)
    num_steps = bisect.bisect_left(range(num_samples), num_samples, key=recipe.training.num_samples)
    if recipe.training.num_steps not in (num_steps, type(recipe.training)().num_steps):
        raise UserError(
            f"training.num_steps={recipe.training.num_steps} and training.num_epochs={recipe.training.num_epochs:g} "
            f"(which takes {num_steps} steps) were both given: give one of them"
        )
    if os.environ.get("RANK", "0") == "0":
        print(f"training.num_epochs={recipe.training.num_epochs:g} takes {num_steps} steps", flush=True)
    return dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, num_steps=num_steps))


def _missing_data(recipe: PretrainRecipe | FinetuneRecipe) -> list[Path]:
    """What a recipe reads and is not here."""
    if isinstance(recipe, FinetuneRecipe):
        paths = [*recipe.data.train, *(one.path for one in recipe.data.validation)]
        here = [path for path in paths if path.exists() or PackManifest.path(path).exists()]
        return [path for path in paths if path not in here and not glob.has_magic(str(path))]
    sources = [] if recipe.data.mock else [source for blend in blends(recipe) for source in blend.sources]
    return [path for path in (Manifest.path(source.path) for source in sources) if not path.exists()]


def _describe(recipe: PretrainRecipe | FinetuneRecipe, tokenizer: TokenizerInfo | None) -> None:
    """Print what a recipe reads and where it would start. Raises UserError for what would be refused then."""
    identity: Callable[[int], dict[str, str]] | None = None
    if missing := _missing_data(recipe):
        print(f"WARNING: the data is not here: {missing[0]}; it is neither checked nor described")
    elif isinstance(recipe, PretrainRecipe):
        print(describe_data(recipe))
        identity = _identity_when_asked(recipe)
    else:
        from megatron_tpt.training.sft import describe_examples

        text, identity = describe_examples(recipe)
        print(text)
    for line in describe_start(recipe, tokenizer, identity):
        print(line)


def _identity_when_asked(recipe: PretrainRecipe) -> Callable[[int], dict[str, str]]:
    """TrainingData.identity; Megatron Core, which takes seconds, is imported only to resume."""

    def identity(num_samples: int) -> dict[str, str]:
        from megatron_tpt.training.data import pretrain_identity

        return pretrain_identity(recipe)(num_samples)

    return identity


def _warn(recipe: PretrainRecipe | FinetuneRecipe) -> None:
    """Say what has no effect, and what is odd about the data. Raises UserError where there is nothing to learn from."""
    packed = isinstance(recipe, FinetuneRecipe) and is_all_packed(recipe)
    lines = [
        *without_effect(recipe, all_packed=packed),
        *context_warnings(recipe),
        *([] if _missing_data(recipe) else data_warnings(recipe)),
    ]
    if os.environ.get("RANK", "0") == "0":
        for line in lines:
            print(f"WARNING: {line}", flush=True)


@contextlib.contextmanager
def _written_in(folder: Path) -> Iterator[None]:
    """A run folder that cannot be written to is the user's to change."""
    try:
        yield
    except OSError as error:
        if is_of_full_disk(error):  # the program says that the disk is full
            raise
        raise UserError(
            f"run.output_dir={folder}: nothing can be written there ({error.strerror}): give another folder"
        ) from None


def _make_run_folder(folder: Path) -> None:
    """Make a run folder, or see that this user may continue what is there, which another may have begun."""
    with _written_in(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        written = [folder / name for name in ("checkpoints", "tensorboard", "logs", "logs/heartbeats")]
        read = [folder / "metrics.jsonl", *(folder / "checkpoints").glob("step_*")]
        for path, right in [*((path, os.W_OK) for path in written), *((path, os.R_OK) for path in read)]:
            if path.exists() and not os.access(path, right | (os.R_OK | os.X_OK if path.is_dir() else 0)):
                act = "write" if right == os.W_OK else "read"
                raise UserError(
                    f"run.output_dir={folder}: {path} is another user's (uid {path.stat().st_uid}), and this one has "
                    f"no right to {act} there: have it granted (chmod -R g+rwX), or give another folder"
                )


def _require_shared_memory(num_workers: int) -> None:
    """Raise UserError when processes that read ahead cannot be coordinated here: their locks are in /dev/shm."""
    try:
        if num_workers:
            multiprocessing.Lock()
    except OSError as error:
        raise UserError(
            f"data.num_workers={num_workers} needs shared memory, and /dev/shm cannot be used here ({error.strerror}): "
            f"mount it, or give --data.num_workers=0"
        ) from None


def prepare[R: PretrainRecipe | FinetuneRecipe](recipe: R, arguments: Arguments) -> R | None:
    """Check a recipe against its data and the number of processes before anything is started.

    Returns it with everything resolved, or None after printing the description that --dry-run asks for. Raises
    UserError with what is refused; of a dry run, behind the description.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if arguments.dry_run:
        world_size = arguments.num_processes or max(world_size, recipe.parallel.model_parallel_size)
    recipe = with_data_of_run(with_steps(with_batches_of_run(recipe)))
    check(recipe, world_size)
    tokenizer = data_tokenizer(recipe, needs_data=not arguments.dry_run)
    if tokenizer is not None and isinstance(recipe, PretrainRecipe):
        _require_folder(recipe, tokenizer)
    if tokenizer is not None:
        _require_tokenizer_of_weights(recipe, tokenizer)
    recipe = with_vocabulary(recipe, tokenizer)
    if not arguments.dry_run:
        _warn(recipe)
        _require_shared_memory(recipe.data.num_workers)
        _make_run_folder(recipe.run.output_dir)
        return recipe
    print(describe(recipe, world_size, find_device(arguments.device), arguments.mfu))
    _warn(recipe)
    _describe(recipe, tokenizer)
    return None


def _refusal(action: Callable[[], None]) -> str | None:
    """What an action says that the user must fix; None where nothing is wrong."""
    try:
        action()
    except UserError as error:
        return str(error)
    return None


def _refuse_together(refusal: str | None) -> None:
    """Raise UserError on all ranks when one has a refusal: they then end alike, and none waits for the others."""
    from megatron_tpt import platform

    for text in filter(None, platform.gather_objects(refusal)):
        raise UserError(text)


@contextlib.contextmanager
def distributed[R: PretrainRecipe | FinetuneRecipe](
    recipe: R, *, before: Callable[[R], None] | None = None
) -> Iterator[None]:
    """The process groups of a recipe and the lock of its run folder, for one `with` block. One process of every machine
    first calls `before`; what it refuses, all refuse, and so with a folder that another job uses."""
    import torch

    from megatron_tpt import platform

    if recipe.run.threads_per_process is not None:
        torch.set_num_threads(recipe.run.threads_per_process)
    with contextlib.ExitStack() as stack:
        refusal = None
        if os.environ.get("RANK", "0") == "0":
            refusal = _refusal(lambda: _lock(recipe.run.output_dir, stack))
        if refusal is None and before is not None and os.environ.get("LOCAL_RANK", "0") == "0":
            refusal = _refusal(lambda: before(recipe))
        with (
            _lost_ranks_told(),
            platform.process_groups(recipe.parallel, timeout_s=recipe.run.first_step_timeout_s),
        ):
            _refuse_together(refusal)
            yield


@contextlib.contextmanager
def _lost_ranks_told() -> Iterator[None]:
    """A rank that others wait for in vain is a fault, told in one line in place of a traceback."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in _LOST):
            raise
        raise Fault(
            "another rank has ended, or cannot be reached any more: its messages say why (where there are none it was "
            "killed, perhaps for memory). The same command resumes from the last checkpoint"
        ) from error


def _lock(folder: Path, stack: contextlib.ExitStack) -> None:
    """Take the lock of a run folder until `stack` ends. Raises UserError when another job has it."""
    with _written_in(folder):
        folder.mkdir(parents=True, exist_ok=True)  # benchmarks, say, have not called `prepare`
        stack.enter_context(run_lock(folder))
