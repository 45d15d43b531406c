"""Samples: which tokens are thinking, and that a step is the same under any layout."""

from pathlib import Path

import numpy as np
import pytest

from megatron_tpt import platform  # noqa: F401  (before Megatron Core)
from megatron_tpt.config.load import recipe_from_dict
from megatron_tpt.config.training import BatchSizeStage, TrainingConfig
from megatron_tpt.indexing import marks
from megatron_tpt.indexing.index import index
from megatron_tpt.indexing.marks import begin_of_marking, mark_thinking
from megatron_tpt.indexing.options import IndexOptions
from megatron_tpt.indexing.tokenizer import Tokenizer
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.records import Record, write_records
from megatron_tpt.training.data import Loader
from megatron_tpt.training.pretrain_data import open_splits, prepare_cache
from megatron_tpt.training.sample_cache import SampleCache

from megatron.core.datasets.indexed_dataset import IndexedDataset

OPEN, CLOSE, EOS = 7, 8, 0


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, OPEN, 3, 4, CLOSE, EOS, 5], [0, 0, 1, 1, 1, 1, 0, 0]),
        ([OPEN, 3, CLOSE, 1, 2, EOS], [1, 1, 1, 0, 0, 0]),
        ([1, OPEN, 2, EOS, 3], [0, 1, 1, 1, 0]),  # a thought that was never closed ends with its document
        ([1, OPEN, CLOSE, OPEN, 2, CLOSE, 3], [0, 1, 1, 1, 1, 1, 0]),
        ([1, 2], [0, 0]),
        ([], []),
    ],
)
def test_tokens_between_the_tags_are_thinking(tokens: list[int], expected: list[int]) -> None:
    assert mark_thinking(np.array(tokens, dtype=np.int64), [OPEN], [CLOSE], EOS).astype(int).tolist() == expected


def test_tags_of_several_tokens_are_found_whole() -> None:
    tokens = np.array([1, 20, 21, 22, 5, 20, 23, 21, 22, 6, 20, 21])
    marks = mark_thinking(tokens, [20, 21, 22], [20, 23, 21, 22], EOS)
    assert marks.astype(int).tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("tags", [([1], [2]), ([1, 1], [1, 2]), ([1, 2, 3], [2, 3]), ([3], [1, 2])])
@pytest.mark.parametrize("first_chunk", [1, 2, 5])
def test_reading_back_to_the_last_tag_gives_the_marks_of_the_whole(
    tags: tuple[list[int], list[int]], first_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marks, "_FIRST_CHUNK", first_chunk)
    random = np.random.default_rng(0)
    for length in random.integers(0, 40, 60):
        tokens = random.integers(0, 5, length)
        whole = mark_thinking(tokens, *tags, EOS)
        for end in range(length + 1):
            read: list[int] = []

            def get(first: int, last: int, tokens=tokens, end=end, read=read) -> np.ndarray:
                assert 0 <= first <= last <= end
                read.append(first)
                return tokens[first:last]

            begin, inside = begin_of_marking(get, end, *tags, EOS)
            last = max(marks._changes(tokens[:end], *tags, EOS)[0], default=0)
            assert min(read, default=end) >= end - 2 * (end - last) - first_chunk - 2  # and not all from the start
            assert mark_thinking(tokens[begin:], *tags, EOS, starts_inside=inside).tolist() == whole[begin:].tolist()


@pytest.fixture
def pretrain_recipe(recipe: dict, index_prefix: Path, tmp_path: Path) -> PretrainRecipe:
    return recipe_from_dict(
        PretrainRecipe, {**recipe, "data": {"train": str(index_prefix), "cache_dir": str(tmp_path / "cache")}}
    )


def test_marks_are_exact_wherever_a_sample_is_cut(
    pretrain_recipe: PretrainRecipe, index_prefix: Path, tokenizer_path: Path
) -> None:
    """Against a walk through every document token by token."""
    tokenizer = Tokenizer(tokenizer_path)
    truth = {}
    for number, document in enumerate(IndexedDataset(str(index_prefix))):
        inside, marks = False, []
        for token in document.tolist():
            inside = inside or token == tokenizer.open_ids[0]
            marks.append(inside)
            inside = inside and token != tokenizer.close_ids[0]
        truth[number] = (document.tolist(), marks)

    prepare_cache(pretrain_recipe)
    dataset = open_splits(pretrain_recipe, SampleCache(pretrain_recipe.data.cache_dir))[0]
    num_samples_within_thought = 0
    for i in range(len(dataset)):
        sample = dataset[i]
        place = dataset.shuffle_index[i]
        (first, offset), (last, _) = dataset.sample_index[place], dataset.sample_index[place + 1]
        documents = [truth[dataset.document_index[d]] for d in range(first, last + 1)]
        tokens = [t for document, _ in documents for t in document][offset:]
        marks = [m for _, marks in documents for m in marks][offset:]
        length = len(sample["labels"])
        assert sample["labels"].tolist() == tokens[1 : length + 1]
        assert sample["is_thinking"].tolist() == marks[1 : length + 1]
        num_samples_within_thought += marks[0] and all(marks[:length])
    assert num_samples_within_thought > 5, "the corpus must hold samples that lie in one thought from end to end"


def test_where_there_is_no_thinking_nothing_before_a_sample_is_read(
    recipe: dict, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_records(tmp_path / "book.jsonl", [Record("book", "lo mi " * 1000, None)])
    index(IndexOptions([tmp_path / "book.jsonl"], tokenizer_path, tmp_path / "book"))
    ours = recipe_from_dict(
        PretrainRecipe, recipe | {"data": {"train": str(tmp_path / "book"), "cache_dir": str(tmp_path / "cache")}}
    )
    prepare_cache(ours)
    dataset = open_splits(ours, SampleCache(tmp_path / "cache"))[0]
    num_read, get = 0, dataset.dataset.get

    def counted(*arguments: int, **places: int) -> np.ndarray:
        nonlocal num_read
        tokens = get(*arguments, **places)
        num_read += len(tokens)
        return tokens

    monkeypatch.setattr(dataset.dataset, "get", counted)
    assert not any(dataset[i]["is_thinking"].any() for i in range(50))
    assert num_read == 50 * 33


TRAINING = TrainingConfig(
    global_batch_size=16, micro_batch_size=2, batch_size_ramp=[BatchSizeStage(2, 8)], skip_steps=[4]
)


@pytest.mark.parametrize("data_parallel_size", [1, 2, 4])
def test_a_step_uses_the_same_samples_at_any_data_parallel_size(data_parallel_size: int) -> None:
    loaders = [Loader([], TRAINING, rank, data_parallel_size, 8) for rank in range(data_parallel_size)]
    for step, expected in enumerate([range(0, 8), range(8, 16), range(16, 32), range(32, 48)]):
        samples = [
            index
            for loader in loaders
            for microbatch in range(loader.num_microbatches(step))
            for index in loader.sample_indices(step, microbatch)
        ]
        assert sorted(samples) == list(expected)
