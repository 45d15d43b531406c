"""tools/inspect_index.py shows what of a packed row is learned."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from chat_templates import CHATML_WITH_SPANS, make_chat_tokenizer

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.inspection import inspect_index
from megatron_tpt.indexing.inspection_options import InspectOptions
from megatron_tpt.indexing.pack_sft import pack_sft
from megatron_tpt.indexing.packed_index import PackedIndex
from megatron_tpt.indexing.packing_options import PackOptions
from megatron_tpt.indexing.tokenizer import Tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "inspect_index.py"
CHATS = [
    [("user", "one\ttwo"), ("assistant", "日本 🙂\n"), ("user", "and"), ("assistant", "\x1b[2J no")],
    [("user", "a"), ("assistant", "b")],
]
SHOWN = (
    "<|im_start|>user\none\ttwo<|im_end|>\n<|im_start|>assistant\n⟦日本 🙂\n<|im_end|>⟧\n"
    "<|im_start|>user\nand<|im_end|>\n<|im_start|>assistant\n⟦\\x1b[2J no<|im_end|>⟧\n"
)


@pytest.fixture(scope="module")
def tokenizer(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_tokenizer(tmp_path_factory.mktemp("chat") / "tokenizer", documents)


def packed(folder: Path, tokenizer: Path, **options: object) -> Path:
    folder.mkdir()
    (folder / "chats.jsonl").write_text(
        "".join(json.dumps({"messages": [{"role": r, "content": c} for r, c in chat]}) + "\n" for chat in CHATS)
    )
    defaults = {"input": [folder / "chats.jsonl"], "tokenizer": tokenizer, "output": folder / "sft"}
    pack_sft(PackOptions(**defaults | {"sequence_length": 300} | options))
    return folder / "sft"


@pytest.fixture(scope="module")
def prefix(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("packed") / "sft", tokenizer)


def test_learned_parts_of_every_example_are_in_brackets(prefix: Path, capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    inspect_index(InspectOptions(prefix, document=0))
    shown = capsys.readouterr().out
    assert SHOWN in shown
    assert "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n" in shown
    assert " tokens in 2 examples; ⟦learned⟧: " in shown
    with pytest.raises(UserError, match="no row 1; they are 0 to 0"):
        inspect_index(InspectOptions(prefix, document=1))


def test_programs_get_the_places_of_the_learned_parts(
    prefix: Path, tokenizer: Path, capsys: pytest.CaptureFixture
) -> None:
    capsys.readouterr()
    inspect_index(InspectOptions(prefix, document=0, json=True))
    report = json.loads(capsys.readouterr().out)
    assert report["document"] == 0 and report["capacity"] == 301
    for shown, example in zip(report["examples"], PackedIndex(prefix)[0], strict=True):
        assert shown["tokens"] == example.tokens.tolist()
        assert shown["text"] == Tokenizer(tokenizer).decode(example.tokens)
        marked = [token for part in shown["learned"] for token in range(*part["tokens"])]
        assert marked == example.has_loss.nonzero()[0].tolist()
        for part in shown["learned"]:
            assert shown["text"][slice(*part["characters"])] == part["text"]
    assert [part["text"] for part in report["examples"][0]["learned"]] == [
        "日本 🙂\n<|im_end|>",
        "\x1b[2J no<|im_end|>",
    ]


def test_a_terminal_shows_colors_and_obeys_no_text(prefix: Path) -> None:
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, TOOL, prefix, "--document", "0"], stdout=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 1 << 20).decode().replace("\r\n", "\n")
    os.close(ours)
    assert "\x1b[32m日本 🙂\n<|im_end|>\x1b[0m" in shown
    assert "\\x1b[2J no" in shown and "⟦" not in shown and "\x1b[2J" not in shown


def test_indices_that_differ_in_what_is_learned_alone_are_not_identical(
    prefix: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    same = packed(tmp_path / "same", tokenizer)
    (tmp_path / "last.jinja").write_text(
        CHATML_WITH_SPANS.replace(" + '<|im_end|>' }}{% endgeneration %}", " }}{% endgeneration %}{{ '<|im_end|>' }}")
    )
    other = packed(tmp_path / "other", tokenizer, chat_template=tmp_path / "last.jinja")
    capsys.readouterr()
    assert inspect_index(InspectOptions(prefix, compare=same))
    assert capsys.readouterr().out == "identical\n"
    assert not inspect_index(InspectOptions(prefix, compare=other))
    assert "the tokens agree, but other parts are learned from row 0 on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"verify": True, "document": 0}, "--document and --verify"),
        ({"verify": True, "compare": Path("x")}, "--verify and --compare"),
        ({"document": 0, "compare": Path("x")}, "--document and --compare"),
        ({"tokenizer": Path("x"), "verify": True}, "add --document N"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        InspectOptions(Path("p"), **options)
