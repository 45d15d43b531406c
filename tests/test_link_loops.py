"""A link that leads to itself, or a name too long, wherever a path is given, is named in one line."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

COMMANDS = {
    "input of prepare": "prepare --input loop.jsonl --output out",
    "output of prepare": "prepare --input documents.jsonl --output loop.jsonl",
    "input of index": "index --input loop.jsonl --tokenizer loop.jsonl --output out",
    "output of index": "index --input documents.jsonl --tokenizer loop.jsonl --output loop.jsonl/a",
    "input of merge_index": "merge_index --input loop --output out",
    "output of merge_index": "merge_index --input loop --output loop",
    "input of pack_sft": "pack_sft --input loop.jsonl --tokenizer loop.jsonl --output out --sequence-length 8",
    "output of train_tokenizer": "train_tokenizer --input documents.jsonl --output loop.jsonl",
    "output of augment": "augment --input documents.jsonl --output loop.jsonl --model loop.jsonl",
    "checkpoint of export_hf": "export_hf --checkpoint loop.jsonl --output out",
    "model of import_hf": "import_hf --model loop.jsonl --output out",
    "problems of evaluate": "evaluate --model loop.jsonl --data loop.jsonl --output out",
    "input of analyze_thinking": "analyze_thinking --input loop.jsonl --by a --output out",
    "recipe of study": "study loop.jsonl --output out",
    "index of inspect_index": "inspect_index loop",
}


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Runs a tool, which must end with code 2 and one line; returns what it wrote on stderr."""

    def run(command: str) -> str:
        name, *arguments = command.split()
        monkeypatch.setattr(sys, "argv", [f"tools/{name}.py", *arguments])
        with pytest.raises(SystemExit) as end:
            importlib.import_module(f"megatron_tpt.tools.{name}").command()
        error = capsys.readouterr().err
        assert end.value.code == 2, error
        assert error.count("error: ") == 1 and "Traceback" not in error
        return error

    return run


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_a_link_to_itself_is_a_mistake_reported_in_one_line(
    command: str, refusal: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("loop", "loop.jsonl", "loop.idx", "loop.bin"):
        Path(name).symlink_to(name)
    Path("documents.jsonl").write_text('{"text": "The ferry leaves at nine."}\n')
    assert "loop" in refusal(command)


LONG = "x" * 300


@pytest.mark.parametrize(
    "command",
    [
        f"export_hf --checkpoint {LONG} --output out",
        f"import_hf --model {LONG} --output out",
        f"prepare --input documents.jsonl --output {LONG}",
        f"merge_index --input {LONG} --output out",
    ],
    ids=lambda command: command.split()[0],
)
def test_a_name_that_no_file_can_have_is_a_mistake_reported_in_one_line(
    command: str, refusal: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("documents.jsonl").write_text('{"text": "The ferry leaves at nine."}\n')
    assert "xxx" in refusal(command)
