"""Mixtures: packed indices by weight and by number in fine-tuning, and as a source of pre-training."""

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from megatron_tpt import platform  # noqa: F401  (before Megatron Core)
from megatron_tpt.config.load import recipe_from_dict
from megatron_tpt.errors import UserError
from megatron_tpt.indexing.pack_sft import pack_sft
from megatron_tpt.indexing.packed_index import PackedIndex
from megatron_tpt.indexing.packing_options import PackOptions
from megatron_tpt.indexing.tokenizer import Tokenizer
from megatron_tpt.recipes.finetune import FinetuneRecipe
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.training.pretrain_data import open_splits, prepare_cache
from megatron_tpt.training.sample_cache import SampleCache
from megatron_tpt.training.sft import PackedExamples, describe_examples, open_sets
from megatron_tpt.training.sft_mixture import MixedRows

LENGTH = 32


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> list[Path]:
    """Two packed indices, "big" with about four times as many rows as "fine"."""
    folder, prefixes = tmp_path_factory.mktemp("packed"), []
    for name, number in (("big", 60), ("fine", 16)):
        rows = [{"prompt": f"Q {name}{i}?", "response": f"{name}{i} " + "ban kert " * (i % 3)} for i in range(number)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pack_sft(
            PackOptions(
                input=[folder / f"{name}.jsonl"], tokenizer=tokenizer_path, output=folder / name,
                sequence_length=LENGTH, prompt_column="prompt", response_column="response",
            )
        )  # fmt: skip
        prefixes.append(folder / name)
    return prefixes


def finetuning(packed: list[Path], tmp_path: Path, **data: object) -> FinetuneRecipe:
    return recipe_from_dict(
        FinetuneRecipe,
        {
            "run": {"output_dir": str(tmp_path / "run")},
            "model": {"num_layers": 1, "hidden_size": 32},
            "training": {"num_steps": 2, "sequence_length": LENGTH, "global_batch_size": 2},
            "data": {"train": list(map(str, packed)), **data},
        },
    )


def drawn(data: PackedExamples, epoch: int) -> Counter[tuple[int, ...]]:
    n = len(data)
    return Counter(tuple(data[epoch * n + i]["tokens"].tolist()) for i in range(n))


def test_an_epoch_draws_what_weights_and_numbers_say(packed: list[Path], tmp_path: Path) -> None:
    sizes = [len(PackedIndex(prefix)) for prefix in packed]
    examples = [PackedIndex(prefix).manifest.counts.examples for prefix in packed]
    assert sizes[0] > 2 * sizes[1]
    tokenizer = Tokenizer(finetuning(packed, tmp_path).tokenizer_path)
    for given, expected in (
        ({"weights": [1, 3]}, [round(sum(sizes) / 4), round(3 * sum(sizes) / 4)]),
        (
            {"num_examples": [examples[0] // 2, examples[1] * 2]},
            [round(examples[0] // 2 / examples[0] * sizes[0]), 2 * sizes[1]],
        ),
    ):
        recipe = finetuning(packed, tmp_path, **given)
        rows, _ = open_sets(recipe, tokenizer)
        assert isinstance(rows, MixedRows) and len(rows) == sum(expected)
        data = PackedExamples(rows, tokenizer, LENGTH, seed=1)
        texts = [tokenizer.decode(list(row)) for row in drawn(data, 0).elements()]
        assert [sum(name in text for text in texts) for name in ("big", "fine")] == expected
        assert f"draws {expected[1]:,} of {sizes[1]:,} rows of set 2" in describe_examples(recipe)[0]


def test_all_rows_of_a_set_are_read_equally_often_over_epochs(packed: list[Path], tmp_path: Path) -> None:
    recipe = finetuning(packed, tmp_path, weights=[1, 3])
    tokenizer = Tokenizer(recipe.tokenizer_path)
    rows, _ = open_sets(recipe, tokenizer)
    data = PackedExamples(rows, tokenizer, LENGTH, seed=1)
    epochs = [drawn(data, epoch) for epoch in range(7)]
    assert epochs[0] != epochs[1]
    total = sum(epochs, Counter[tuple[int, ...]]())
    for name in ("big", "fine"):
        counts = [count for row, count in total.items() if name in tokenizer.decode(list(row))]
        assert max(counts) - min(counts) <= 1 and len(counts) == len(PackedIndex(packed[name == "fine"]))
    again, _ = open_sets(recipe, tokenizer)
    far = PackedExamples(again, tokenizer, LENGTH, seed=1)
    assert drawn(far, 5) == epochs[5]  # from the middle, as after a resume


def test_epochs_of_a_recipe_count_the_rows_that_are_drawn(packed: list[Path], tmp_path: Path) -> None:
    recipe = finetuning(packed, tmp_path, num_examples=[30, 32])
    recipe.training.num_steps, recipe.training.num_epochs = type(recipe.training)().num_steps, 3
    rows = len(open_sets(recipe, Tokenizer(recipe.tokenizer_path))[0])
    assert recipe.with_steps().training.num_steps == -(-3 * rows // 2)


def test_mixtures_that_make_no_sense_are_refused(packed: list[Path], tmp_path: Path) -> None:
    for given, message in [
        ({"weights": [1]}, r"data\.weights has 1 values, data\.train 2"),
        ({"weights": [1, 1], "num_examples": [1, 1]}, "both say how much to draw"),
        ({"weights": [1, 0]}, r"data\.weights\[1\]"),
    ]:
        with pytest.raises(UserError, match=message):
            finetuning(packed, tmp_path, **given)
    with pytest.raises(UserError, match="an epoch draws no row of"):
        open_sets(
            finetuning(packed, tmp_path, weights=[1000, 0.001]), Tokenizer(finetuning(packed, tmp_path).tokenizer_path)
        )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pretraining_on_a_packed_index_learns_the_answers_alone(
    packed: list[Path], index_prefix: Path, recipe: dict, tmp_path: Path, num_workers: int
) -> None:
    sources = [{"path": str(index_prefix), "weight": 80}, {"path": str(packed[0]), "weight": 20, "name": "qa"}]
    pretrain = recipe_from_dict(
        PretrainRecipe,
        {**recipe, "data": {"train": sources, "cache_dir": str(tmp_path / "cache"), "num_workers": num_workers}},
    )
    assert not pretrain.missing_data()
    list(pretrain.data_warnings())
    prepare_cache(pretrain)
    [blend] = open_splits(pretrain, SampleCache(tmp_path / "cache"))
    tokenizer = Tokenizer(pretrain.read_tokenizer().path)
    answers, num_samples = 0, Counter[int]()
    loader = torch.utils.data.DataLoader(blend, num_workers=num_workers, batch_size=None)
    for sample in itertools.islice(loader, pretrain.training.num_samples(pretrain.training.num_steps)):
        source = int(sample["source"])
        num_samples[source] += 1
        mask, labels = sample["loss_mask"].numpy() > 0, sample["labels"].numpy()
        if source == 0:
            assert mask.all()
            continue
        text = tokenizer.decode(labels[mask].tolist())
        assert "Q" not in text and "?" not in text
        answers += text.count("big")
        assert mask[labels == tokenizer.eos_id].all() and not mask.all()
    assert answers > 10 and 0.15 < num_samples[1] / num_samples.total() < 0.25
