"""Killed, or stopped by a full disk, at any moment of publishing, the same command completes the same files; and files
of others in their place stay."""

import errno
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tpt.errors import UserError
from megatron_tpt.indexing.index import index_shards
from megatron_tpt.indexing.merge import merge
from megatron_tpt.indexing.merge_options import MergeOptions
from megatron_tpt.indexing.options import IndexOptions
from megatron_tpt.indexing.output import publish
from megatron_tpt.indexing.pack_sft import pack_sft
from megatron_tpt.indexing.packing_options import PackOptions

JOBS = ["index", "a set of shards", "merge", "pack_sft"]
KILLED = 9
fork = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def commands(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[Path], object]]:
    """By name, what makes an output at a prefix."""
    folder = tmp_path_factory.mktemp("inputs")
    rows = [{"text": f"the ferry {i}", "prompt": f"ferry {i}?", "response": "at nine"} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = [folder / "rows.jsonl"]
    for name in ("a", "b"):
        index_shards(IndexOptions(inputs, tokenizer_dir, folder / name))
    pairs = {"prompt_column": "prompt", "response_column": "response"}
    return {
        "index": lambda prefix: index_shards(IndexOptions(inputs, tokenizer_dir, prefix)),
        "a set of shards": lambda prefix: index_shards(IndexOptions(inputs, tokenizer_dir, prefix, shard_size="100")),
        "merge": lambda prefix: merge(MergeOptions(prefix, [str(folder / "a"), str(folder / "b")])),
        "pack_sft": lambda prefix: pack_sft(PackOptions(inputs, tokenizer_dir, prefix, sequence_length=64, **pairs)),
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fail_at(step: int, fault: Callable[[], None]) -> None:
    """Have `fault` happen in place of call number `step` of those that publishing consists of."""
    num_calls = 0

    def failing(call: Callable) -> Callable:
        def failing_call(*arguments: object, **options: object) -> object:
            nonlocal num_calls
            num_calls += 1
            if num_calls == step:
                fault()
            return call(*arguments, **options)

        return failing_call

    for module, name in ((os, "replace"), (os, "fsync"), (os, "unlink"), (shutil, "rmtree")):
        setattr(module, name, failing(getattr(module, name)))


def fill_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def run(command: Callable[[Path], object], prefix: Path, step: int, fault: Callable[[], None]) -> int:
    """The exit code of a process of its own that runs `command`, and meets `fault` on the way."""

    def failing_publish(*arguments: object) -> None:
        fail_at(step, fault)
        publish(*arguments)

    def child() -> None:

        for function in (index_shards, merge, pack_sft):
            function.__globals__["publish"] = failing_publish
        try:
            command(prefix)
        except UserError:
            os._exit(2)
        os._exit(0)

    process = fork.Process(target=child)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("fault", [lambda: os._exit(KILLED), fill_disk], ids=["killed", "full disk"])
@pytest.mark.parametrize("job", JOBS)
def test_stopped_at_any_moment_of_publishing_the_same_command_completes(
    job: str, fault: Callable[[], None], commands: dict, tmp_path: Path
) -> None:
    command = commands[job]
    command(tmp_path / "unbroken/x")
    expected = contents(tmp_path / "unbroken")
    codes = []
    while 0 not in codes:
        folder = tmp_path / str(len(codes))
        codes.append(run(command, folder / "x", len(codes) + 1, fault))
        command(folder / "x")
        assert contents(folder) == expected, len(codes)
    assert len(codes) > 8 and set(codes) <= {0, 2, KILLED}


@pytest.mark.parametrize("job", JOBS)
def test_a_file_that_appears_before_publishing_stays(
    job: str, commands: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = commands[job]
    command(tmp_path / "unbroken/x")
    expected = contents(tmp_path / "unbroken")
    foreign = tmp_path / "x" / min(name for name in expected if name.endswith(".idx"))

    def late_publish(*arguments: object) -> None:
        foreign.write_text("precious")
        publish(*arguments)

    with monkeypatch.context() as patch:
        for function in (index_shards, merge, pack_sft):
            patch.setitem(function.__globals__, "publish", late_publish)
        with pytest.raises(UserError, match=f"{foreign.name} exists and was not made by this program"):
            command(tmp_path / "x/x")
    assert foreign.read_text() == "precious"
    assert [path for path in foreign.parent.iterdir() if not path.name.startswith(".")] == [foreign]
    with pytest.raises(UserError, match=f"{foreign.name.removesuffix('.idx')}.* exists"):
        command(tmp_path / "x/x")
    assert foreign.read_text() == "precious"
    foreign.unlink()
    command(tmp_path / "x/x")
    assert contents(tmp_path / "x") == expected
