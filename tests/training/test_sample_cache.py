"""Sample indices: Megatron Core's order, whole files whoever builds them and however they die, no stale ones."""

import dataclasses
import math
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from training_runs import PRETRAIN, Workers, read_metrics

from megatron_tpt import platform  # noqa: F401  (before Megatron Core)
from megatron_tpt.config.load import recipe_from_dict
from megatron_tpt.errors import UserError
from megatron_tpt.indexing.index import index
from megatron_tpt.indexing.manifest import Manifest
from megatron_tpt.indexing.options import IndexOptions
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.records import Record, write_records
from megatron_tpt.training import pretrain_data, pretrain_samples
from megatron_tpt.training.pretrain_data import open_splits, prepare_cache
from megatron_tpt.training.sample_cache import MissingEntryError, SampleCache
from megatron_tpt.training.sample_index import build_blend_index

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

TOOL = Path(__file__).parents[2] / "tools" / "build_cache.py"
fork = multiprocessing.get_context("fork")  # torch is imported already


def make_recipe(recipe: dict, prefixes: list[Path], cache: Path, **training: int) -> PretrainRecipe:
    sources = [{"path": str(prefix), "weight": 1.0 + i} for i, prefix in enumerate(prefixes)]
    changes = {"training": recipe["training"] | training, "data": {"train": sources, "cache_dir": str(cache)}}
    return recipe_from_dict(PretrainRecipe, {**recipe, **changes})


def copies(prefix: Path, folder: Path, number: int) -> list[Path]:
    """The same index under several names."""
    targets = [folder / f"{prefix.name}-{i}" for i in range(number)]
    for target in targets:
        for kind in ("bin", "idx", "json"):
            shutil.copyfile(f"{prefix}.{kind}", f"{target}.{kind}")
    return targets


def contents(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.iterdir() if not path.name.startswith(".")}


def megatrons_own(prefixes: list[Path], recipe: PretrainRecipe, cache: Path):
    """What plain Megatron Core makes of the same settings."""
    tokenizer = SimpleNamespace(eod=0, vocab_size=None, unique_identifiers={})
    config = GPTDatasetConfig(
        random_seed=recipe.run.seed,
        sequence_length=recipe.training.sequence_length,
        blend_per_split=[([str(p) for p in prefixes], [s.weight for s in recipe.data.train]), None, None],
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    num_samples = recipe.training.num_steps * recipe.training.global_batch_size
    return BlendedMegatronDatasetBuilder(GPTDataset, [num_samples, None, None], lambda: True, config).build()[0]


@pytest.mark.parametrize("epochs", [0.1, 0.99, 1.3, 1.95, 2.5, 3.95])
def test_the_order_of_one_dataset_is_megatron_cores(
    epochs: float, recipe: dict, index_prefix: Path, tmp_path: Path
) -> None:
    """Also where the last epoch is shuffled separately (less than 0.8 of it is used), and where it is not."""
    num_tokens = Manifest.read(index_prefix).counts.tokens
    num_steps = int(epochs * num_tokens / 32 / 8)
    ours = make_recipe(recipe, [index_prefix], tmp_path / "ours", num_steps=num_steps)
    theirs = megatrons_own([index_prefix], ours, tmp_path / "theirs")
    prepare_cache(ours)
    dataset = open_splits(ours, SampleCache(tmp_path / "ours"))[0]
    assert len(theirs.document_index) == math.ceil(epochs) * 300
    for name in ("document_index", "sample_index", "shuffle_index"):
        expected = getattr(theirs, name)
        assert getattr(dataset, name).dtype == expected.dtype
        np.testing.assert_array_equal(getattr(dataset, name), expected)
    assert dataset[3]["tokens"].equal(theirs[3]["tokens"])


def test_the_order_of_a_blend_is_megatron_cores(recipe: dict, index_prefix: Path, tmp_path: Path) -> None:
    prefixes = copies(index_prefix, tmp_path, 3)
    ours = make_recipe(recipe, prefixes, tmp_path / "ours", num_steps=100)
    theirs = megatrons_own(prefixes, ours, tmp_path / "theirs")
    prepare_cache(ours)
    blend = open_splits(ours, SampleCache(tmp_path / "ours"))[0]
    np.testing.assert_array_equal(blend.dataset_index, theirs.dataset_index)
    np.testing.assert_array_equal(blend.dataset_sample_index, theirs.dataset_sample_index)
    for i in (0, 1, 2, 5, 799):
        assert blend[i]["tokens"].equal(theirs[i]["tokens"])


@pytest.mark.parametrize("number", [1, 2])
def test_a_process_that_reads_ahead_maps_the_arrays_itself(
    number: int, recipe: dict, index_prefix: Path, tmp_path: Path
) -> None:
    """What is sent to it holds no array, and the same samples come out."""
    ours = make_recipe(recipe, copies(index_prefix, tmp_path, number), tmp_path / "cache", num_steps=2000)
    prepare_cache(ours)
    dataset = open_splits(ours, SampleCache(tmp_path / "cache"))[0]
    sent = pickle.dumps(dataset)
    assert len(sent) < 20_000 < sum(path.stat().st_size for path in (tmp_path / "cache").glob("*shuffle_index.npy"))
    for i in (0, 7, len(dataset) - 1):
        assert pickle.loads(sent)[i]["tokens"].equal(dataset[i]["tokens"])


def test_megatron_core_itself_opens_what_we_built(recipe: dict, index_prefix: Path, tmp_path: Path) -> None:
    ours = make_recipe(recipe, [index_prefix], tmp_path / "cache")
    prepare_cache(ours)
    before = contents(tmp_path / "cache")
    dataset = open_splits(ours, SampleCache(tmp_path / "cache"))[0]
    opened = GPTDataset._build_document_sample_shuffle_indices(dataset)
    for array, expected in zip(
        opened, (dataset.document_index, dataset.sample_index, dataset.shuffle_index), strict=True
    ):
        np.testing.assert_array_equal(array, expected)
    assert contents(tmp_path / "cache") == before


def test_processes_that_build_at_once_leave_one_whole_cache(recipe: dict, index_prefix: Path, tmp_path: Path) -> None:
    prefixes = copies(index_prefix, tmp_path, 5)
    alone, together = (make_recipe(recipe, prefixes, tmp_path / name) for name in ("alone", "together"))
    prepare_cache(alone)
    processes = [fork.Process(target=prepare_cache, args=(together,)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")
    assert not list((tmp_path / "together").glob(".building*"))


def test_processes_that_may_do_without_locks_leave_one_whole_cache_too(
    recipe: dict, index_prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(UserError, match="file system without locks"):
        prepare_cache(make_recipe(recipe, copies(index_prefix, tmp_path, 2), tmp_path / "refused"))
    monkeypatch.setenv("MEGATRON_TPT_NO_LOCKS", "1")
    test_processes_that_build_at_once_leave_one_whole_cache(recipe, index_prefix, tmp_path)


def build_slowly(recipe: PretrainRecipe) -> None:
    """Wait before and after each array, so that a kill can come between any two steps."""
    save, replace = np.save, os.replace

    def slow(action):
        def act(*args, **kwargs):
            time.sleep(0.01)
            action(*args, **kwargs)
            time.sleep(0.01)

        return act

    np.save, os.replace = slow(save), slow(replace)
    prepare_cache(recipe)


def test_a_build_killed_at_any_moment_is_completed_by_the_next(
    recipe: dict, index_prefix: Path, tmp_path: Path
) -> None:
    prefixes = copies(index_prefix, tmp_path, 2)
    whole = make_recipe(recipe, prefixes, tmp_path / "whole")
    prepare_cache(whole)
    expected = contents(tmp_path / "whole")
    for moment in range(8):
        killed = make_recipe(recipe, prefixes, tmp_path / f"killed-{moment}")
        process = fork.Process(target=build_slowly, args=(killed,))
        process.start()
        time.sleep(0.04 * moment)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        # What lies there under its final name is whole, even now.
        found = contents(killed.data.cache_dir) if killed.data.cache_dir.exists() else {}
        assert found.items() <= expected.items()
        prepare_cache(killed)
        assert contents(killed.data.cache_dir) == expected
        assert not list(killed.data.cache_dir.glob(".building*/**/*.*"))


def test_what_other_machines_build_is_left_alone_until_it_is_old(
    recipe: dict, index_prefix: Path, tmp_path: Path
) -> None:
    """Their locks may not be seen here."""
    ours, another = f".building-{socket.gethostname()}_x", f".building-{socket.gethostname()}-2_x"
    for name in (ours, another, ".building-abandoned_x"):
        (tmp_path / "cache" / name).mkdir(parents=True)
    os.utime(tmp_path / "cache" / ".building-abandoned_x", (0, 0))
    prepare_cache(make_recipe(recipe, [index_prefix], tmp_path / "cache"))
    assert [path.name for path in (tmp_path / "cache").glob(".building*")] == [another]


def test_a_cached_index_is_not_built_again(
    recipe: dict, index_prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = make_recipe(recipe, [index_prefix], tmp_path / "cache")
    prepare_cache(ours)
    monkeypatch.setattr(pretrain_samples, "build_sample_index", None)
    prepare_cache(ours)


@pytest.mark.parametrize("change", [{"sequence_length": 16}, {"num_steps": 21}, {"seed": 2}, {"content": True}])
def test_the_cache_of_other_settings_or_another_content_is_not_used(
    change: dict, recipe: dict, index_prefix: Path, tmp_path: Path
) -> None:
    prefix = copies(index_prefix, tmp_path, 1)[0]
    prepare_cache(make_recipe(recipe, [prefix], tmp_path / "cache"))
    other = make_recipe(
        recipe, [prefix], tmp_path / "cache", **{k: v for k, v in change.items() if k in recipe["training"]}
    )
    if "seed" in change:
        other = dataclasses.replace(other, run=dataclasses.replace(other.run, seed=2))
    if "content" in change:  # other documents at the same place
        tokenizer = Path(Manifest.read(prefix).tokenizer.path)
        for kind in ("bin", "idx", "json"):
            Path(f"{prefix}.{kind}").unlink()
        write_records(tmp_path / "other.jsonl", (Record(f"{i}", "ban ke lo " * (i % 9 + 1), None) for i in range(300)))
        index(IndexOptions(input=[tmp_path / "other.jsonl"], tokenizer=tokenizer, output=prefix))
    with pytest.raises(MissingEntryError, match=r"tools/build_cache.py"):
        open_splits(other, SampleCache(tmp_path / "cache"))


def test_an_index_at_another_place_uses_the_same_cache(recipe: dict, index_prefix: Path, tmp_path: Path) -> None:
    """Machines may have their own copy of the data under their own path."""
    prepare_cache(make_recipe(recipe, [index_prefix], tmp_path / "cache"))
    elsewhere = make_recipe(recipe, copies(index_prefix, tmp_path, 1), tmp_path / "cache")
    assert open_splits(elsewhere, SampleCache(tmp_path / "cache"))[0] is not None


def test_an_array_cut_short_is_built_again(recipe: dict, index_prefix: Path, tmp_path: Path, capfd) -> None:
    ours = make_recipe(recipe, [index_prefix], tmp_path / "cache")
    prepare_cache(ours)
    expected = contents(tmp_path / "cache")
    for number, path in enumerate(sorted((tmp_path / "cache").glob("*.npy"))):
        os.truncate(path, number * 100)
        prepare_cache(ours)
        assert "not whole" in capfd.readouterr().out
        assert contents(tmp_path / "cache") == expected


def test_a_folder_that_cannot_be_written_is_named(recipe: dict, index_prefix: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: the sample indices cannot be built there .* data\.cache_dir"):
        prepare_cache(make_recipe(recipe, [index_prefix], tmp_path / "file"))


def test_more_datasets_than_files_may_be_open(recipe: dict, index_prefix: Path, tmp_path: Path) -> None:
    prefixes = copies(index_prefix, tmp_path, 12)
    ours = make_recipe(recipe, prefixes, tmp_path / "cache")

    def with_limits(soft: int, hard: int, expected: str | None) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        try:
            prepare_cache(ours)
        except UserError as error:
            assert expected is not None and expected in str(error)
        else:
            assert expected is None

    used = max(map(int, os.listdir("/proc/self/fd"))) + 1  # the limit is on the number, not on how many there are
    for limits in [(used + 20, 4096, None), (used + 20, used + 20, "merge them with tools/merge_index.py")]:
        process = fork.Process(target=with_limits, args=limits)
        process.start()
        process.join()
        assert process.exitcode == 0


def test_many_small_datasets_keep_no_file_open(
    recipe: dict, index_prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And have the same samples as few, whose text is mapped."""
    ours = make_recipe(recipe, copies(index_prefix, tmp_path, 6), tmp_path / "cache")
    prepare_cache(ours)
    cache, open_before = SampleCache(tmp_path / "cache"), len(os.listdir("/proc/self/fd"))
    [mapped] = open_splits(ours, cache)
    open_with_few = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(pretrain_data, "_MAX_MAPPED", 5)
    [unmapped] = open_splits(ours, cache)
    assert len(os.listdir("/proc/self/fd")) == open_with_few > open_before
    for one, other in ((mapped, unmapped), (mapped, pickle.loads(pickle.dumps(unmapped)))):
        assert all(torch.equal(one[i]["tokens"], other[i]["tokens"]) for i in range(20))
    assert len(os.listdir("/proc/self/fd")) == open_with_few


def test_a_blend_has_a_largest_number_of_sources(
    recipe: dict, index_prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain_data, "_MAX_SOURCES", 2)
    with pytest.raises(UserError, match=r"3 indices in the blend train, and at most 2 fit: merge them with"):
        prepare_cache(make_recipe(recipe, copies(index_prefix, tmp_path, 3), tmp_path / "cache"))


def test_machines_with_a_cache_each_train_as_with_a_common_one(
    recipe: dict, index_prefix: Path, tmp_path: Path, workers: Workers
) -> None:
    changes = {"training": {**recipe["training"], "num_steps": 3}}
    losses = []
    for name, cache, ranks_per_node in (("common", "cache", None), ("apart", "cache-{node}", 1)):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**recipe, **changes, "run": {"output_dir": str(tmp_path / name)}}))
        workers.run(PRETRAIN, [str(path), f"--data.cache_dir={tmp_path / cache}"], 2, ranks_per_node=ranks_per_node)
        losses.append([line["loss"] for line in read_metrics(tmp_path / name)])
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert contents(tmp_path / "cache") == contents(tmp_path / "cache-0") == contents(tmp_path / "cache-1")


def test_the_tool_builds_what_training_opens(recipe: dict, index_prefix: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, TOOL, path, "--cache-dir", tmp_path / "cache", "--training.num_steps=7"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"{tmp_path / 'cache'}" in result.stdout
    assert open_splits(
        make_recipe(recipe, [index_prefix], tmp_path / "cache", num_steps=7), SampleCache(tmp_path / "cache")
    )


def test_a_dataset_too_small_for_its_weight_is_named() -> None:
    with pytest.raises(UserError, match="takes 50 samples of its dataset 1, which has 10"):
        build_blend_index([0.5, 0.5], 100, [60, 10])
