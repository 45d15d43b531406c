"""Fine-tuning: the loss is on the response alone, and packed examples do not see each other."""

import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from chat_templates import CHATML
from training_runs import FINETUNE, Train

from megatron_tpt import platform
from megatron_tpt.config.data import SftDataConfig
from megatron_tpt.config.load import load_recipe
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.run import RunConfig
from megatron_tpt.config.training import SftTrainingConfig, TrainingConfig
from megatron_tpt.errors import UserError
from megatron_tpt.indexing.conversations import Example, PairFormat
from megatron_tpt.indexing.example_files import read_examples
from megatron_tpt.indexing.pack_sft import pack_sft
from megatron_tpt.indexing.packed_index import PackedIndex
from megatron_tpt.indexing.packing_options import PackOptions
from megatron_tpt.indexing.tokenizer import Tokenizer
from megatron_tpt.models.gpt.build import build_model
from megatron_tpt.models.gpt.config import GPTConfig
from megatron_tpt.objectives.language_modeling import LanguageModeling
from megatron_tpt.recipes.finetune import FinetuneRecipe
from megatron_tpt.recipes.program import prepare
from megatron_tpt.training.checkpoint_files import step_folder
from megatron_tpt.training.sft import ExampleRows, JoinedRows, PackedExamples, PackedRows, build_sft_data, open_sets
from megatron_tpt.training.steps import _attention_mask


@pytest.fixture(scope="session")
def pairs(examples_path: Path, tokenizer_path: Path) -> ExampleRows:
    format = PairFormat(Tokenizer(tokenizer_path), "prompt", "response")
    examples = [example for _, example in read_examples(examples_path, format)]
    return ExampleRows([example for example in examples if isinstance(example, Example)], 129)


@pytest.fixture(scope="session")
def chats_prefix(examples_path: Path, tokenizer_path: Path) -> Path:
    """The same examples as conversations, some of two turns, packed into rows of 256."""
    source, template = examples_path.with_name("chats.jsonl"), examples_path.with_name("chatml.jinja")
    template.write_text(CHATML)
    with source.open("w") as file:
        for i, line in enumerate(examples_path.read_text().splitlines()):
            fields = json.loads(line)
            user, assistant = ({"role": "user", "content": fields["prompt"]}, {"role": "assistant"})
            turn = [user, assistant | {"content": fields["response"]}]
            file.write(json.dumps({"messages": turn * (1 + i % 2)}) + "\n")
    prefix = examples_path.with_name("chats")
    pack_sft(
        PackOptions(
            input=[source], tokenizer=tokenizer_path, output=prefix, sequence_length=256, chat_template=template
        )
    )
    return prefix


def test_loss_is_on_the_response_and_its_end(pairs: ExampleRows, tokenizer_path: Path) -> None:
    tokenizer = Tokenizer(tokenizer_path)
    data = PackedExamples(pairs, tokenizer, sequence_length=128, seed=0)
    responses = []
    for i in range(len(data.rows)):
        row = data[i]
        counted = row["labels"][row["loss_mask"] > 0].tolist()
        text = tokenizer.decode(counted)
        assert "?" not in text and "sule" not in text
        responses += [part for part in text.split("<|endoftext|>") if part]
        thinking = tokenizer.decode(row["labels"][row["is_thinking"] & (row["loss_mask"] > 0)].tolist())
        assert thinking.count("<think>") == thinking.count("</think>") == counted.count(tokenizer.eos_id)
        assert "miga" not in thinking
    assert sorted(r.split("</think>\n")[1] for r in responses) == sorted(f"miga{i}" for i in range(40))


def test_every_epoch_holds_every_row_once_in_another_order(pairs: ExampleRows, tokenizer_path: Path) -> None:
    data = PackedExamples(pairs, Tokenizer(tokenizer_path), sequence_length=128, seed=0)
    n = len(data.rows)
    epochs = [[tuple(data[epoch * n + i]["tokens"].tolist()) for i in range(n)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert len(set(epochs[0])) == n
    assert epochs[0] != epochs[1]


def test_rows_of_several_indices_follow_each_other(pairs: ExampleRows, chats_prefix: Path) -> None:
    chats = PackedIndex(chats_prefix)
    joined = JoinedRows([PackedRows(chats), PackedRows(chats)])
    assert len(joined) == 2 * len(chats)
    for row in range(len(joined)):
        for found, expected in zip(joined[row], chats[row % len(chats)], strict=True):
            np.testing.assert_array_equal(found.tokens, expected.tokens)
            np.testing.assert_array_equal(found.has_loss, expected.has_loss)


@pytest.mark.parametrize("source", ["pairs", "packed index"])
def test_packed_examples_have_the_losses_that_they_have_alone(
    source: str, pairs: ExampleRows, chats_prefix: Path, tokenizer_path: Path
) -> None:
    tokenizer = Tokenizer(tokenizer_path)
    rows, length = (pairs, 128) if source == "pairs" else (PackedIndex(chats_prefix), 256)
    data = PackedExamples(rows, tokenizer, length, seed=0)
    model_config = GPTConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, ffn_hidden_size=64, init_std=0.2)
    with platform.process_groups(ParallelConfig()), torch.no_grad():
        platform.seed_everything(0)
        model = build_model(
            model_config, ParallelConfig(), TrainingConfig(dtype="float32", sequence_length=length), seed=0
        )
        batch = torch.utils.data.default_collate([data[i] for i in range(3)])
        mask = _attention_mask(batch)
        losses = model(batch["tokens"], batch["position_ids"], attention_mask=mask, labels=batch["labels"])
        packed_total, sums = LanguageModeling()(losses, batch)
        order = np.random.RandomState(0).permutation(len(rows))
        examples = [rows[int(order[i])] for i in range(3)]
        assert max(map(len, examples)) > 1
        total, num_tokens = 0.0, 0
        for example in itertools.chain.from_iterable(examples):
            tokens = torch.from_numpy(example.tokens.astype(np.int64))[None]
            positions = torch.arange(tokens.shape[1] - 1)[None]
            alone = model(tokens[:, :-1], positions, attention_mask=None, labels=tokens[:, 1:])[0]
            counted = torch.from_numpy(example.has_loss[1:].copy())
            total += float(alone[counted].sum())
            num_tokens += int(counted.sum())
    assert int(sums["tokens"]) == num_tokens
    assert float(packed_total) == pytest.approx(total, rel=1e-5)


def test_packed_index_and_files_give_the_same_samples(
    pairs: ExampleRows, examples_path: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    pack_sft(
        PackOptions(
            input=[examples_path],
            tokenizer=tokenizer_path,
            output=tmp_path / "pairs",
            sequence_length=128,
            prompt_column="prompt",
            response_column="response",
        )
    )
    tokenizer = Tokenizer(tokenizer_path)
    packed = PackedExamples(PackedIndex(tmp_path / "pairs"), tokenizer, 128, seed=3)
    in_memory = PackedExamples(pairs, tokenizer, 128, seed=3)
    for i in range(2 * len(pairs)):
        for name, tensor in packed[i].items():
            torch.testing.assert_close(tensor, in_memory[i][name], rtol=0, atol=0)


def test_finetuning_starts_from_a_checkpoint_and_learns(
    train: Train, examples_path: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    train("base")
    checkpoint = tmp_path / "base/checkpoints/latest"
    changes = {
        "model": {},  # the checkpoint's
        "training": {
            "num_steps": 30,
            "dtype": "float32",
            "sequence_length": 128,
            "global_batch_size": 4,
            "init_from": str(checkpoint),
        },
        "data": {"train": str(examples_path)},
    }
    metrics = train("tuned", program=FINETUNE, changes=changes)
    assert metrics[-1]["loss_answer"] < metrics[0]["loss_answer"] - 1
    assert metrics[-1]["loss_thinking"] < metrics[0]["loss_thinking"] - 1
    two = train("tuned2", "--parallel.tensor_parallel_size=2", program=FINETUNE, changes=changes, num_processes=2)
    assert [m["loss"] for m in two] == pytest.approx([m["loss"] for m in metrics], rel=1e-4)


@pytest.fixture
def chats_recipe(chats_prefix: Path, tokenizer_path: Path) -> dict:
    return {
        "training": {
            "num_epochs": 2,
            "dtype": "float32",
            "sequence_length": 256,
            "global_batch_size": 4,
            "micro_batch_size": 2,
        },
        "data": {"train": str(chats_prefix), "tokenizer": str(tokenizer_path)},
    }


def test_epochs_of_a_packed_index_are_added_and_resume_to_the_bit(
    train: Train, chats_recipe: dict, chats_prefix: Path
) -> None:
    num_rows = len(PackedIndex(chats_prefix))
    constant = chats_recipe | {"optimizer": {"schedule": "constant"}}
    unbroken = train("unbroken", program=FINETUNE, changes=constant)
    assert len(unbroken) == -(-2 * num_rows // 4) > 5
    train("run", "--training.num_epochs=1", program=FINETUNE, changes=constant)
    resumed = train("run", "--data.num_workers=1", program=FINETUNE, changes=constant)
    assert [(m["step"], m["loss"], m["grad_norm"]) for m in resumed] == [
        (m["step"], m["loss"], m["grad_norm"]) for m in unbroken
    ]


def test_resume_with_other_data_is_refused(
    train: Train, chats_recipe: dict, chats_prefix: Path, examples_path: Path
) -> None:
    steps = {"training": chats_recipe["training"] | {"num_epochs": None, "num_steps": 3}}
    save = {"checkpoint": {"save_interval": 2}}
    train("run", program=FINETUNE, changes=chats_recipe | steps | save)
    with pytest.raises(AssertionError, match=r"UserError.*another content of data\.train"):
        train("run", f"--data.train={examples_path}", program=FINETUNE, changes=chats_recipe | steps | save)


def with_foreign_tokens(prefix: Path, folder: Path) -> Path:
    """A copy of an index whose tokens are no longer those that were written."""
    shutil.copytree(prefix.parent, folder)
    bin_path = folder / f"{prefix.name}.bin"
    bin_path.write_bytes(b"\xff" * bin_path.stat().st_size)
    return folder / prefix.name


def test_a_damaged_token_is_told_in_one_line(
    train: Train, chats_recipe: dict, chats_prefix: Path, index_prefix: Path, tmp_path: Path
) -> None:
    expected = (
        r"UserError.*the data have token (65535|-1), and the model's vocabulary has \d+: a file of the data is damaged"
    )
    chats_recipe["data"]["train"] = str(with_foreign_tokens(chats_prefix, tmp_path / "chats"))
    with pytest.raises(AssertionError, match=expected):
        train("tuned", program=FINETUNE, changes=chats_recipe)
    text = with_foreign_tokens(index_prefix, tmp_path / "text")
    with pytest.raises(AssertionError, match=expected) as raised:
        train("base", f"--data.train={text}", "--data.num_workers=1")
    assert "DataLoader worker" not in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--training.sequence_length=64"], "packed for training.sequence_length=256, not 64"),
        (["--data.train=[PREFIX, JSONL]"], "mixes packed indices with other files"),
        (["--data.train=JSONL"], "training.num_epochs needs packed indices"),
        (["--training.num_epochs=0"], "training.num_epochs=0"),
        (["--data.tokenizer=OTHER"], "packed with another tokenizer"),
    ],
)
def test_what_a_packed_index_cannot_do_is_refused(
    overrides: list[str],
    words: str,
    chats_recipe: dict,
    chats_prefix: Path,
    examples_path: Path,
    tokenizer_path: Path,
    tmp_path: Path,
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tokenizer_path, other)
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(chats_recipe | {"model": {"vocab_size": 512}}))
    names = {"PREFIX": chats_prefix, "JSONL": examples_path, "OTHER": other}
    for name, value in names.items():
        overrides = [override.replace(name, str(value)) for override in overrides]
    with pytest.raises(UserError, match=re.escape(words)):
        recipe = prepare(*load_recipe(FinetuneRecipe, [str(path), *overrides]))
        with platform.process_groups(ParallelConfig()):
            build_sft_data(recipe)


@pytest.mark.parametrize("line", ["no json", '{"prompt": "p"}', '{"prompt": 1, "response": "r"}', "[1, 2]"])
def test_a_bad_line_is_named(line: str, tokenizer_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "p", "response": "r"}\n' + line + "\n")
    recipe = FinetuneRecipe(data=SftDataConfig(train=[path], tokenizer=tokenizer_path))
    with pytest.raises(UserError, match=r"bad\.jsonl:2: .*: fix the line"):
        build_sft_data(recipe)


def test_columns_that_are_not_read_are_named(
    tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "p", "response": "r", "system": "be kind"}\n{"prompt": "p", "response": "r"}\n')
    recipe = FinetuneRecipe(data=SftDataConfig(train=[path], tokenizer=tokenizer_path))
    open_sets(recipe, Tokenizer(tokenizer_path))
    assert f"note: {path}: column 'system' is not read (1)" in capsys.readouterr().out


def test_messages_in_files_of_texts_are_refused_for_what_they_are(tokenizer_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "messages.jsonl"
    path.write_text('{"prompt": [{"role": "user", "content": "p"}], "response": [{"role": "assistant"}]}\n')
    recipe = FinetuneRecipe(data=SftDataConfig(train=[path], tokenizer=tokenizer_path))
    with pytest.raises(UserError, match=r"messages, not texts .* pack what are conversations \(tools/pack_sft\.py\)"):
        open_sets(recipe, Tokenizer(tokenizer_path))


def test_the_command_to_evaluate_asks_as_the_data_did(tokenizer_path: Path, tmp_path: Path) -> None:
    chat_tokenizer = tmp_path / "chat"
    shutil.copytree(tokenizer_path, chat_tokenizer)
    (chat_tokenizer / "chat_template.jinja").write_text(CHATML)
    run = tmp_path / "run"
    shutil.copytree(chat_tokenizer, step_folder(run / "checkpoints", 1) / "tokenizer")
    question, answer = {"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}
    rows = {"chats": {"messages": [question, answer]}, "texts": {"prompt": "p", "response": "r"}}
    found = {}
    for name, row in rows.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        columns = {} if "messages" in row else {"prompt_column": "prompt", "response_column": "response"}
        options = {"tokenizer": chat_tokenizer, "sequence_length": 64, **columns}
        pack_sft(PackOptions(input=[path], output=tmp_path / name, **options))
        found[name] = _asks_for_chat(tmp_path / name, run)
    assert found == {"chats": True, "texts": False}
    assert not _asks_for_chat(tmp_path / "texts.jsonl", run)


def _asks_for_chat(data: Path, run: Path) -> bool:
    training = SftTrainingConfig(num_steps=1)
    recipe = FinetuneRecipe(run=RunConfig(output_dir=run), data=SftDataConfig(train=[data]), training=training)
    return recipe.next_steps(1).endswith(" --chat")
