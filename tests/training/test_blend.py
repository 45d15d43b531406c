"""Blends: their sources, their phases, what was taken from each, and how they may change on the way."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from training_runs import PRETRAIN, Train, Workers

from megatron_tpt import platform
from megatron_tpt.config.data import DataPhase, DatasetSource
from megatron_tpt.config.load import recipe_from_dict, to_yaml
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.training import TrainingConfig
from megatron_tpt.errors import UserError
from megatron_tpt.indexing.index import index
from megatron_tpt.indexing.manifest import Manifest
from megatron_tpt.indexing.options import IndexOptions
from megatron_tpt.models.gpt.build import build_model
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.records import Record, write_records
from megatron_tpt.training.blend import blends, continue_phases, describe_data
from megatron_tpt.training.data import SourceTokens
from megatron_tpt.training.pretrain_data import build_pretrain_data, open_splits, prepare_cache
from megatron_tpt.training.pretrain_samples import MockDataset, segments
from megatron_tpt.training.sample_cache import SampleCache
from megatron_tpt.training.sample_index import build_blend_index, build_phased_index
from megatron_tpt.training.steps import forward_step


@pytest.fixture(scope="session")
def two_sources(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Indices of 200 and 100 documents with other words."""
    folder = tmp_path_factory.mktemp("sources")
    for name, word, number in (("first", "ban ke ", 200), ("second", "lort mi ", 100)):
        write_records(
            folder / f"{name}.jsonl", (Record(f"{name}-{i}", word * (9 + i % 9), None) for i in range(number))
        )
        index(IndexOptions(input=[folder / f"{name}.jsonl"], tokenizer=tokenizer_path, output=folder / name))
    return [folder / "first", folder / "second"]


def make(recipe: dict, data: dict, **training) -> PretrainRecipe:
    return recipe_from_dict(PretrainRecipe, {**recipe, "data": data, "training": {**recipe["training"], **training}})


def test_phases_follow_each_other_and_sources_go_on_where_they_were() -> None:
    blend = build_phased_index([([0.75, 0.25, 0.0], 100), ([0.0, 0.5, 0.5], 50)], [100, 100, 100])
    first = build_blend_index([0.75, 0.25], 100, [100, 100])
    np.testing.assert_array_equal(blend.dataset_index[:100], first.dataset_index)
    assert np.bincount(blend.dataset_index[100:]).tolist() == [0, 25, 25]
    for dataset, used in enumerate((75, 50, 25)):  # none repeated, none omitted
        assert blend.dataset_sample_index[blend.dataset_index == dataset].tolist() == list(range(used))


def test_a_phase_ends_at_its_tokens_and_what_was_taken_is_counted(
    recipe: dict, two_sources: list[Path], tmp_path: Path
) -> None:
    first, second = map(str, two_sources)
    phases = [
        {"until_tokens": 60 * 32 - 5, "train": first},
        {"train": [{"path": first, "weight": 0.5}, {"path": second, "weight": 0.5}]},
    ]
    ours = make(recipe, {"phases": phases, "cache_dir": str(tmp_path)})
    prepare_cache(ours)
    (dataset,) = open_splits(ours, SampleCache(tmp_path))
    assert dataset.samples_by_source(0, 60).tolist() == [60, 0]
    assert dataset.samples_by_source(60, 160).tolist() == [50, 50]
    (blend,) = blends(ours)
    taken = SourceTokens(dataset, blend, [Manifest.read(source.path) for source in blend.sources])
    for num_samples in (70, 160, 62):  # in any order
        numbers = [dataset[i]["source"].item() for i in range(num_samples)]
        expected = {"first": numbers.count(0) * 32, "second": numbers.count(1) * 32}
        assert taken.after(num_samples) == expected
    assert taken.epochs({"first": 0, "second": 3200})["second"] == pytest.approx(
        3200 / Manifest.read(two_sources[1]).counts.tokens
    )


def test_changed_data_becomes_a_phase_and_the_same_data_none() -> None:
    a, b, c = ([DatasetSource(Path(name))] for name in "abc")
    assert continue_phases([DataPhase(a)], [DataPhase(b)], 10, 32) == ([DataPhase(a, 320), DataPhase(b)], True)
    once = [DataPhase(a, 320), DataPhase(b)]
    assert continue_phases(once, [DataPhase(b)], 20, 32) == (once, False)
    assert continue_phases(once, [DataPhase(a)], 5, 32) == ([DataPhase(a)], True)
    assert continue_phases(once, [DataPhase(c)], 20, 32) == ([*once[:1], DataPhase(b, 640), DataPhase(c)], True)
    assert continue_phases(once, [DataPhase(a, 320), DataPhase(c)], 10, 32) == ([once[0], DataPhase(c)], True)


def test_data_changes_on_resume_where_that_is_allowed_and_nowhere_else(
    train: Train, two_sources: list[Path], tmp_path: Path, workers: Workers
) -> None:
    """From a checkpoint on, a run that changes is the run whose phases said so from the start."""
    first, second = map(str, two_sources)
    cache = {"cache_dir": str(tmp_path / "cache")}
    short = ["--training.num_steps=6", "--checkpoint.save_interval=3"]
    phases = [{"until_tokens": 3 * 8 * 32, "train": first}, {"train": second}]
    planned = train("planned", *short, changes={"data": {"phases": phases, **cache}}, num_processes=2)
    train("changed", *short, changes={"data": {"train": first, **cache}})
    shutil.rmtree(tmp_path / "changed/checkpoints/step_00000006")
    other = {"data": {"train": second, **cache}}
    with pytest.raises(AssertionError, match=r"another data\.train.*--data\.allow_change=true"):
        train("changed", *short, changes=other)
    for _ in range(2):  # the second time nothing changes any more
        changed = train("changed", *short, "--data.allow_change=true", changes=other)
        assert [row["loss"] for row in changed] == pytest.approx([row["loss"] for row in planned], rel=1e-5)
    resolved = yaml.safe_load((tmp_path / "changed/run.yaml").read_text())["data"]["phases"]
    assert [phase["until_tokens"] for phase in resolved] == [3 * 8 * 32, None]
    assert changed[-1]["source_tokens/second"] == changed[-1]["source_tokens/first"] == 3 * 8 * 32
    assert planned[2]["source_loss/first"] == planned[2]["loss"] and "source_loss/second" not in planned[2]


def test_a_longer_run_begins_with_the_samples_of_a_shorter_one_wherever_it_may_go_on_from_it(
    recipe: dict, two_sources: list[Path], tmp_path: Path
) -> None:
    """Runs of up to several epochs: from the middle of the first, over ends of epochs, where the last epoch begins to
    be shuffled with the others, into the second phase."""
    first, second = map(str, two_sources)
    both = [{"path": first, "weight": 0.7}, {"path": second, "weight": 0.3}]
    kinds = {
        "single": {"train": first},
        "blend": {"train": both},
        "phases": {"phases": [{"until_tokens": 50 * 8 * 32, "train": both}, {"train": second}]},
    }
    lengths = [2, 15, 30, 40, 49, 51]
    for kind, data in kinds.items():
        runs = [make(recipe, {**data, "cache_dir": str(tmp_path / kind)}, num_steps=length) for length in lengths]
        for run in runs:
            prepare_cache(run)
        with platform.process_groups(ParallelConfig()):
            opened = [build_pretrain_data(run) for run in runs]
        samples = [
            [one.train.dataset[i]["tokens"].tolist() for i in range(0, 8 * length, 4)]
            for length, one in zip(lengths, opened, strict=True)
        ]
        found = set()
        for shorter, longer in itertools.combinations(range(len(runs)), 2):
            may_go_on = opened[shorter].identity(8 * lengths[shorter]) == opened[longer].identity(8 * lengths[shorter])
            is_same = samples[shorter] == samples[longer][: len(samples[shorter])]
            assert is_same or not may_go_on, (kind, lengths[shorter], lengths[longer])
            found.add((may_go_on, is_same))
        assert found >= {(True, True), (False, False)}, kind


def test_a_run_is_prolonged_where_its_data_is_not_gone_through_more_often(
    train: Train, two_sources: list[Path], recipe: dict, workers: Workers, tmp_path: Path
) -> None:
    changes = {"data": {"train": str(two_sources[0])}, "optimizer": {**recipe["optimizer"], "schedule": "constant"}}
    whole = train("whole", "--training.num_steps=9", changes=changes)
    train("run", "--training.num_steps=5", changes=changes)
    prolonged = train("run", "--training.num_steps=9", changes=changes)
    exact = ("step", "loss", "grad_norm", "learning_rate", "tokens")
    assert [[row[name] for name in exact] for row in prolonged] == [[row[name] for name in exact] for row in whole]

    def resumed(*overrides: str) -> str:
        return workers.run(PRETRAIN, [str(tmp_path / "run.yaml"), *overrides], 1)

    with pytest.raises(AssertionError, match=r"another number of times through data\.train.*allow_change=true"):
        resumed("--training.num_steps=100")
    with pytest.raises(AssertionError, match=r"step_00000009 is beyond training\.num_steps=8: raise it"):
        resumed("--training.num_steps=8")
    rate = "warning: the learning rate continues at"
    assert rate not in resumed("--training.num_steps=10")
    assert f"{rate} 0.000954" in resumed("--training.num_steps=12", "--optimizer.schedule=cosine")


def test_validation_sets_have_losses_of_their_own(train: Train, two_sources: list[Path]) -> None:
    first, second = map(str, two_sources)
    training = ["--training.num_steps=4", "--training.validation_interval=4", "--training.validation_steps=1"]
    sets = {
        "both": [first, {"path": second, "name": "other"}],
        "first": [first],
        "blend": [{"path": first, "name": "x"}, {"path": second, "name": "x"}],
    }
    last = {
        name: train(name, *training, changes={"data": {"train": first, "validation": own}})[-1]
        for name, own in sets.items()
    }
    assert last["both"]["validation_loss/first"] == last["first"]["validation_loss"]
    halves = (last["both"]["validation_loss/first"], last["both"]["validation_loss/other"])
    assert last["both"]["validation_loss"] == pytest.approx(sum(halves) / 2)
    assert "validation_loss/x" not in last["blend"] and halves[0] != halves[1]


def test_wildcards_share_their_weight_by_tokens_and_files_hold_sources(
    recipe: dict, two_sources: list[Path], tmp_path: Path
) -> None:
    tokens = [Manifest.read(path).counts.tokens for path in two_sources]
    pattern = str(two_sources[0].parent / "*")
    ours = make(recipe, {"train": [{"path": pattern, "weight": 3.0, "name": "all", "max_epochs": 9}, "other"]})
    shares = [(str(source.path), source.weight, source.shown_name) for source in ours.data.train]
    assert shares == [
        (str(two_sources[0]), pytest.approx(3 * tokens[0] / sum(tokens)), "all"),
        (str(two_sources[1]), pytest.approx(3 * tokens[1] / sum(tokens)), "all"),
        ("other", 1.0, "other"),
    ]
    assert ours.data.train[0].max_epochs == 9
    (tmp_path / "set-00001-of-00002.json").write_text(Manifest.path(two_sources[0]).read_text())
    with pytest.raises(UserError, match=r"1 of 2 shards missing: .*set-00000-of-00002\.json is"):
        make(recipe, {"train": str(tmp_path / "set-*")})
    for name, text in (("b.yaml", "[p, {path: q, weight: 3}]"), ("b.json", '["p", {"path": "q", "weight": 3}]')):
        (tmp_path / name).write_text(text)
        ours = make(recipe, {"train": str(tmp_path / name)})
        assert [(str(s.path), s.weight) for s in ours.data.train] == [("p", 0.25), ("q", 0.75)]
    (tmp_path / "b.yaml").write_text("p: 1")
    with pytest.raises(UserError, match=r"b\.yaml must hold a list of sources"):
        make(recipe, {"train": str(tmp_path / "b.yaml")})


def test_a_recipe_with_phases_reads_back_as_itself(recipe: dict) -> None:
    phases = [{"until_tokens": "6e3", "train": "a"}, {"train": [{"path": "b", "weight": 2, "max_epochs": 4}]}]
    ours = make(recipe, {"phases": phases})
    assert ours.data.phases[0] == DataPhase([DatasetSource(Path("a"))], 6000.0)
    assert recipe_from_dict(PretrainRecipe, yaml.safe_load(to_yaml(ours))) == ours


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"phases": [{"train": "a"}, {"train": "b"}]}, "until_tokens must be there and grow"),
        ({"phases": [{"train": "a", "until_tokens": 9}, {"train": "b", "until_tokens": 8}, {"train": "c"}]}, "grow"),
        ({"phases": [{"train": "a", "until_tokens": 10}]}, "data.phases end after 10.0 tokens"),
        ({"phases": [{"until_tokens": 10}, {"train": "a"}]}, "a phase has no data"),
        ({"phases": [{"train": "a"}], "train": "b"}, "give one of train, phases and mock"),
        ({"phases": [{"train": "a", "until": 3}]}, "until"),
        ({"mock": True}, "give model.vocab_size"),
        ({"train": [{"path": "a", "max_epochs": 0}]}, "max_epochs 0"),
        ({"train": "missing.yaml"}, "missing.yaml: No such file"),
    ],
)
def test_data_that_cannot_be_meant_is_refused(recipe: dict, data: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make(recipe, data).check(1)


def test_more_epochs_than_allowed_are_refused_and_repetition_is_shown(recipe: dict, two_sources: list[Path]) -> None:
    tokens = Manifest.read(two_sources[1]).counts.tokens
    data = {"train": [str(two_sources[0]), {"path": str(two_sources[1]), "max_epochs": 2.0}]}
    num_steps = int(2 * 2.0 * tokens / (8 * 32))
    epochs = describe_data(make(recipe, data, num_steps=num_steps)).splitlines()[2].split()[-1]
    assert float(epochs) == pytest.approx(2.0, abs=0.05)
    with pytest.raises(UserError, match=r"second would be gone through 2\.\d+ times, and its max_epochs is 2"):
        describe_data(make(recipe, data, num_steps=num_steps + 5))


def test_what_one_rank_refuses_all_refuse(train: Train, two_sources: list[Path]) -> None:
    """The first of a machine opens the data before the others: they must not wait for it in vain."""
    changes = {"data": {"train": [{"path": str(two_sources[1]), "max_epochs": 0.1}]}}
    timeouts = ["--run.first_step_timeout_s=60", "--run.distributed_timeout_s=60"]
    with pytest.raises(AssertionError) as caught:
        train("run", *timeouts, changes=changes, num_processes=2)
    for rank in (0, 1):
        assert f"rank {rank}: UserError('data: {two_sources[1]} would be gone through" in str(caught.value)


def test_documents_of_a_sample_are_distinguished() -> None:
    tokens = torch.tensor([5, 6, 0, 7, 0, 0, 8])
    marks = segments(tokens, 0)
    assert marks["segment_ids"].tolist() == [1, 1, 1, 2, 2, 3, 4]
    assert marks["position_ids"].tolist() == [0, 1, 2, 0, 1, 0, 0]


def test_a_document_is_read_as_if_it_were_alone(recipe: dict, index_prefix: Path, tmp_path: Path) -> None:
    """Token losses of a sample of several documents are those of every document alone."""
    data = {"train": str(index_prefix), "cache_dir": str(tmp_path), "reset_at_documents": True}
    ours = make(recipe, data)
    prepare_cache(ours)
    (dataset,) = open_splits(ours, SampleCache(tmp_path))
    sample = next(dataset[i] for i in range(len(dataset)) if dataset[i]["segment_ids"].max() > 1)
    model = {**recipe["model"], "vocab_size": 320}
    config = recipe_from_dict(PretrainRecipe, {**recipe, "model": model}).model
    with platform.process_groups(ParallelConfig()):
        platform.seed_everything(0)
        gpt = build_model(config, ParallelConfig(), TrainingConfig(dtype="float32", sequence_length=32), seed=0)

        def losses(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            rows = {name: value[None] for name, value in batch.items()}
            return forward_step(iter([rows]), gpt, needs="token_losses", evaluate=lambda *_: None)[0][0]

        together = losses(sample)
        for segment in sample["segment_ids"].unique():
            place = sample["segment_ids"] == segment
            alone = {name: value[place] for name, value in sample.items() if name != "segment_ids"}
            torch.testing.assert_close(losses(alone), together[place], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["document", "thinking"])
def test_loss_is_on_the_kind_of_token_asked_for(kind: str, recipe: dict, index_prefix: Path, tmp_path: Path) -> None:
    data = {"train": str(index_prefix), "cache_dir": str(tmp_path)}
    prepare_cache(make(recipe, data))
    (plain,) = open_splits(make(recipe, data), SampleCache(tmp_path))
    (masked,) = open_splits(make(recipe, {**data, "loss_on": kind}), SampleCache(tmp_path))
    for i in range(20):
        assert masked[i]["tokens"].equal(plain[i]["tokens"])
        wanted = plain[i]["is_thinking"] == (kind == "thinking")
        assert masked[i]["loss_mask"].tolist() == wanted.float().tolist()


def test_random_tokens_train_without_files_and_are_the_same_again(train: Train, recipe: dict) -> None:
    changes = {"data": {"mock": True}, "model": {**recipe["model"], "vocab_size": 320}}
    rows = train("mock", "--training.num_steps=3", changes=changes)
    assert rows[-1]["loss"] == pytest.approx(np.log(384), abs=0.5)
    dataset = MockDataset(320, 32, seed=1)
    assert dataset[7]["tokens"].equal(dataset[7]["tokens"]) and not dataset[7]["tokens"].equal(dataset[8]["tokens"])
    assert dataset[7]["tokens"][1:].equal(dataset[7]["labels"][:-1])
    assert json.dumps(rows[-1])  # plain values
