"""Validation: every sample of a set exactly once, weighted by tokens, in pre-training and fine-tuning; and losses of
nothing, which are never NaN."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from chat_templates import CHATML
from training_runs import FINETUNE, Train

from megatron_tpt.config.load import load_recipe, recipe_from_dict
from megatron_tpt.config.training import TrainingConfig
from megatron_tpt.errors import UserError
from megatron_tpt.indexing.index import index
from megatron_tpt.indexing.options import IndexOptions
from megatron_tpt.indexing.pack_sft import pack_sft
from megatron_tpt.indexing.packing_options import PackOptions
from megatron_tpt.indexing.reader import IndexReader
from megatron_tpt.indexing.tokenizer import Tokenizer
from megatron_tpt.recipes.finetune import FinetuneRecipe
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.recipes.program import prepare
from megatron_tpt.records import Record, write_records
from megatron_tpt.training.data import ValidationLoader, _PaddedDataset
from megatron_tpt.training.pretrain_data import open_splits, prepare_cache
from megatron_tpt.training.sample_cache import SampleCache
from megatron_tpt.training.sft import open_sets


class Numbers(torch.utils.data.Dataset):
    """Item i is i, three labels of which have a loss."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        assert 0 <= index < self.size
        return {"tokens": torch.full((3,), index), "labels": torch.full((3,), index), "loss_mask": torch.ones(3)}


@pytest.mark.parametrize("size", [1, 5, 8, 13, 24])
@pytest.mark.parametrize(("micro_batch_size", "ranks", "multiple"), [(1, 1, 1), (2, 2, 1), (1, 4, 2), (4, 1, 1)])
def test_every_sample_is_read_once_and_all_ranks_take_equally_many_batches(
    size: int, micro_batch_size: int, ranks: int, multiple: int
) -> None:
    training = TrainingConfig(global_batch_size=8, micro_batch_size=micro_batch_size)
    num_steps = -(-size // 8)
    seen, num_batches = [], set()
    for rank in range(ranks):
        dataset = _PaddedDataset(Numbers(size))
        loader = ValidationLoader(dataset, training, rank, ranks, size, 0, num_steps, size, multiple)
        batches = list(loader.iterate(0, num_steps))
        num_batches.add(len(batches))
        assert len(batches) == sum(loader.num_microbatches(step) for step in range(num_steps))
        assert all(loader.num_microbatches(step) % multiple == 0 for step in range(num_steps))
        for batch in batches:
            assert batch["tokens"].shape == (micro_batch_size, 3)
            counted = batch["loss_mask"].sum(dim=1) > 0
            seen += batch["tokens"][counted][:, 0].tolist()
    assert sorted(seen) == list(range(size)) and len(num_batches) == 1
    assert num_batches.pop() * micro_batch_size * ranks < size + micro_batch_size * ranks * multiple


@pytest.fixture(scope="module")
def plain_prefix(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index without thinking, of few documents."""
    folder = tmp_path_factory.mktemp("plain")
    write_records(folder / "records.jsonl", [Record(str(i), f"ban kert losh {'miga ' * i}") for i in range(23)])
    index(IndexOptions(input=[folder / "records.jsonl"], tokenizer=tokenizer_path, output=folder / "plain"))
    return folder / "plain"


@pytest.mark.parametrize("resets", [False, True])
def test_a_whole_set_has_every_token_as_a_label_once(
    resets: bool, recipe: dict, index_prefix: Path, plain_prefix: Path, tmp_path: Path
) -> None:
    sets = [{"path": str(index_prefix), "name": "v"}, {"path": str(plain_prefix), "name": "v"}]
    ours = recipe_from_dict(
        PretrainRecipe,
        recipe
        | {"training": {**recipe["training"], "validation_interval": 1, "validation_steps": "all"}}
        | {"data": {"train": str(index_prefix), "validation": sets, "cache_dir": str(tmp_path)}}
        | {"model": {**recipe["model"], "vocab_size": 320}},
    )
    ours.data.reset_at_documents = resets
    prepare_cache(ours)
    _, whole = open_splits(ours, SampleCache(tmp_path))
    labels: list[int] = []
    for i in range(len(whole)):
        sample = whole[i]
        assert sample["tokens"].shape == sample["labels"].shape == (32,)
        assert ("segment_ids" in sample) == resets
        labels += sample["labels"][sample["loss_mask"] > 0].tolist()
    expected: list[int] = []
    for prefix in (index_prefix, plain_prefix):
        reader = IndexReader(prefix)
        tokens = np.concatenate([reader.document(i) for i in range(len(reader.document_lengths()))])
        expected += tokens[1:].tolist()
    assert labels == expected


PAIRS: list[dict[str, str]] = [
    {"prompt": f"sule {i} ?\n", "response": f"ban kert {'losh ' * (i % 5)}miga{i}"} for i in range(26)
]


@pytest.fixture(scope="module")
def pairs_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("validation") / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return path


def pack(source: Path, output: Path, tokenizer: Path, messages: list[list[dict[str, Any]]]) -> Path:
    source.write_text("".join(json.dumps({"messages": one}) + "\n" for one in messages))
    template = source.with_suffix(".jinja")
    template.write_text(CHATML)
    pack_sft(
        PackOptions(input=[source], tokenizer=tokenizer, output=output, sequence_length=64, chat_template=template)
    )
    return output


def sft_recipe(pairs: Path, tokenizer: Path, **training: object) -> dict:
    steps = {
        "num_steps": 1,
        "dtype": "float32",
        "sequence_length": 64,
        "global_batch_size": 4,
        "validation_interval": 1,
    }
    return {
        "training": steps | training,
        # So small a step leaves the weights as they are: what is trained and what is validated have one loss.
        "optimizer": {"learning_rate": 1e-12, "schedule": "constant", "weight_decay": 0.0},
        "data": {"train": [str(pairs)], "tokenizer": str(tokenizer), "validation": [str(pairs)]},
    }


def test_validation_in_finetuning_is_over_all_learned_tokens_on_any_number_of_ranks(
    train: Train, pairs_path: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "sule ?"}, {"role": "assistant", "content": "ban losh"}]
    chats = pack(tmp_path / "c.jsonl", tmp_path / "chats", tokenizer_path, [turns * (1 + i % 3) for i in range(9)])
    changes = sft_recipe(pairs_path, tokenizer_path)
    changes["data"]["validation"] = [str(pairs_path), {"path": str(chats), "name": "chats"}]
    ours = recipe_from_dict(FinetuneRecipe, {"model": {"vocab_size": 320}, **changes})
    rows, sets = open_sets(ours, Tokenizer(tokenizer_path))
    assert len(rows) % 4 and len(sets["chats"]) % 4, "no last batch in part"

    whole = {**changes, "training": changes["training"] | {"global_batch_size": len(rows)}}
    trained, validated = train("whole", program=FINETUNE, changes=whole)
    assert validated["validation_loss/pairs.jsonl"] == pytest.approx(trained["loss"], rel=1e-6)
    losses = [validated[f"validation_loss/{name}"] for name in ("pairs.jsonl", "chats")]
    tokens = [sets[name].counts.learned_tokens for name in ("pairs.jsonl", "chats")]
    assert validated["validation_loss"] == pytest.approx(np.average(losses, weights=tokens), rel=1e-6)
    assert validated["validation_loss_answer"] == validated["validation_loss"]

    options = ["--training.num_steps=3", "--training.validation_interval=2", "--training.micro_batch_size=2"]
    split = [row for row in train("split", *options, program=FINETUNE, changes=changes, num_processes=2)]
    rows_of_validation = [row for row in split if "validation_loss" in row]
    assert [row["step"] for row in rows_of_validation] == [2, 3]
    for row in rows_of_validation:
        names = [name for name in validated if name != "step"]
        assert [row[name] for name in names] == [pytest.approx(validated[name], rel=1e-5) for name in names]


def sft_prepared(folder: Path, content: dict, *overrides: str) -> FinetuneRecipe | None:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"run": {"output_dir": str(folder / "run")}, **content}))
    return prepare(*load_recipe(FinetuneRecipe, [str(path), *overrides]))


def test_packed_data_without_a_learned_token_is_refused_at_the_start(
    pairs_path: Path, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "user", "content": "sule ?"}, {"role": "assistant", "content": "ban"}]
    good = pack(tmp_path / "g.jsonl", tmp_path / "good", tokenizer_path, [turns])
    silent = tmp_path / "silent"
    for kind in ("bin", "idx", "sft", "sft.json"):
        Path(f"{silent}.{kind}").write_bytes(Path(f"{good}.{kind}").read_bytes())
    manifest = json.loads(Path(f"{silent}.sft.json").read_text())
    manifest["counts"]["loss_tokens"] = 0
    Path(f"{silent}.sft.json").write_text(json.dumps(manifest))
    content = sft_recipe(silent, tokenizer_path)
    with pytest.raises(UserError, match=r"data\.train has no token to learn from \(.*silent\)"):
        sft_prepared(tmp_path, content)
    content["data"] |= {"train": [str(good)], "validation": [{"path": str(silent), "name": "mute"}]}
    for dry_run in ([], ["--dry-run"]):
        with pytest.raises(UserError, match=r"data\.validation \(mute\) has no token to learn from"):
            sft_prepared(tmp_path, content, *dry_run)
    content["data"] |= {"train": [str(good), str(silent)], "validation": [str(good)], "on_too_long": "skip"}
    capsys.readouterr()
    assert sft_prepared(tmp_path, content) is not None
    lines = capsys.readouterr().out.splitlines()
    assert any(f"data.train: {silent} has no token to learn from" in line for line in lines)
    assert any("data.on_too_long=skip has no effect: it needs files of examples" in line for line in lines)


def test_examples_that_are_skipped_are_counted_and_none_left_is_refused(
    pairs_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = sft_recipe(pairs_path, tokenizer_path, sequence_length=12)
    changes["data"] |= {"on_too_long": "skip"}
    ours = recipe_from_dict(FinetuneRecipe, {"model": {"vocab_size": 320}, **changes})
    tokenizer = Tokenizer(tokenizer_path)
    rows, _ = open_sets(ours, tokenizer)
    skipped = len(PAIRS) - rows.counts.examples
    assert skipped > 0 and f"warning: {skipped} of 26 examples are longer than" in capsys.readouterr().out
    ours.training.sequence_length = 2
    with pytest.raises(UserError, match=r"no example to learn from \(26 were read\)"):
        open_sets(ours, tokenizer)


@pytest.mark.parametrize(
    ("data", "reported"),
    [
        (
            {"train": "PLAIN", "loss_on": "thinking"},
            r"data\.train has no token to learn from with data\.loss_on=thinking",
        ),
        (
            {"train": "BOTH", "validation": "PLAIN", "loss_on": "thinking"},
            r"data\.validation \(plain\) has no token to learn from",
        ),
    ],
)
def test_indices_without_a_token_to_learn_from_are_refused(
    data: dict, reported: str, recipe: dict, plain_prefix: Path, index_prefix: Path
) -> None:
    paths = {"PLAIN": str(plain_prefix), "BOTH": str(index_prefix)}
    training = {**recipe["training"], "validation_interval": 1}
    ours = recipe_from_dict(
        PretrainRecipe, {**recipe, "training": training, "data": {k: paths.get(v, v) for k, v in data.items()}}
    )
    with pytest.raises(UserError, match=reported):
        list(ours.data_warnings())
    blend = recipe_from_dict(
        PretrainRecipe,
        {**recipe, "data": {"train": [paths["PLAIN"], {"path": paths["BOTH"], "weight": 1e-5}], "loss_on": "thinking"}},
    )
    lines = list(blend.data_warnings())
    assert [line.split(" ")[-1] for line in lines] == ["data.loss_on=thinking", "weight"]
    blend.training.num_steps = 10000
    assert any(" times: give more data" in line for line in blend.data_warnings())


def test_steps_without_a_learned_token_have_no_loss_and_are_no_spikes(
    train: Train, recipe: dict, index_prefix: Path, plain_prefix: Path, tmp_path: Path
) -> None:
    """One sample in four has thinking; validation sets of both kinds."""
    sources = [{"path": str(plain_prefix), "weight": 3}, str(index_prefix)]
    changes = {
        "training": {**recipe["training"], "num_steps": 24, "global_batch_size": 1, "micro_batch_size": 1}
        | {"validation_interval": 24, "validation_steps": 1},
        "data": {"train": sources, "validation": [str(index_prefix)], "loss_on": "thinking"},
        "faults": {"on_loss_spike": "stop"},
        "logging": {"log_interval": 1, "tensorboard": True},
    }
    train("run", changes=changes)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in metrics.jsonl")

    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    steps = [row for row in rows if "tokens_per_s" in row]
    assert len(steps) == 24 and 12 < sum("loss" not in row for row in steps) < 24
    assert all(("loss" in row) == ("perplexity" in row) == ("loss_thinking" in row) for row in steps)
    assert all(value is not None for row in steps for value in row.values())


def test_values_that_json_does_not_know_are_null(tmp_path: Path) -> None:
    from megatron_tpt.training.reporting import MetricsWriter

    ours = recipe_from_dict(PretrainRecipe, {"run": {"output_dir": str(tmp_path)}})
    writer = MetricsWriter(ours, resumed_step=0)
    shown: list[str] = []
    writer.tensorboard = SimpleNamespace(
        add_scalar=lambda name, *_: shown.append(name), flush=lambda: None, close=lambda: None
    )
    writer.write(1, {"loss": float("inf"), "perplexity": float("nan"), "tokens": 3})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "perplexity": null, "tokens": 3}\n'
    assert shown == ["tokens"]
