"""Jobs whose input has grown do the new files alone; an output within the input is refused."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from augment_runs import good_texts, job, records, shards, write_documents
from unruly_server import UnrulyServer, unruly_server

from megatron_tpt.errors import UserError
from megatron_tpt.jobs.options import ScaleOptions
from megatron_tpt.thinking.augment import augment
from megatron_tpt.thinking.shards import Output


@pytest.fixture
def server() -> Iterator[UnrulyServer]:
    with unruly_server() as running:
        yield running


def test_files_added_to_the_input_are_all_that_is_done(
    server: UnrulyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = job(tmp_path / "docs", server, good_texts(7))
    options = dataclasses.replace(options, input=[str(tmp_path / "docs" / "*.jsonl")], output=tmp_path / "out")
    augment(options)
    before = shards(options.output)
    for name in ("a", "z"):  # before and after the file that was there
        write_documents(tmp_path / "docs" / f"{name}.jsonl", ({"text": f"ok 0 {name}{i}"} for i in range(3)))
    asked = len(server.bodies)
    progress = augment(options)
    assert (progress.records, progress.shards, progress.shards_skipped) == (6, 2, 2)
    assert len(server.bodies) == asked + 6
    assert before.items() <= shards(options.output).items()
    texts = [record.text for record in records(options.output)]
    assert texts == [*good_texts(7), *(f"ok 0 {name}{i}" for name in "az" for i in range(3))]
    assert f"the input has grown, 2 added ({tmp_path}/docs/a.jsonl, {tmp_path}/docs/z.jsonl)" in capsys.readouterr().err
    assert augment(options).records == 0
    (tmp_path / "docs" / "a.jsonl").unlink()
    with pytest.raises(UserError, match=r"input: 1 removed \(.*/docs/a\.jsonl\)"):
        augment(options)


def test_no_task_of_a_job_that_has_grown_has_finished(server: UnrulyServer, tmp_path: Path) -> None:
    options = job(tmp_path, server, good_texts(3))
    tasks = [dataclasses.replace(options, scale=ScaleOptions(num_tasks=2), task=task) for task in range(2)]
    for task in tasks:
        augment(task)
    output = Output(options.output)
    assert output.unfinished_tasks(2) == []
    more = write_documents(tmp_path / "more.jsonl", [{"text": "ok 0 more"}])
    tasks = [dataclasses.replace(task, input=[*task.input, str(more)]) for task in tasks]
    augment(tasks[1])
    assert output.unfinished_tasks(2) == [0]
    augment(tasks[0])
    assert output.unfinished_tasks(2) == []
    assert len(records(options.output)) == 4


def test_an_output_inside_the_input_is_refused(server: UnrulyServer, tmp_path: Path) -> None:
    options = job(tmp_path / "docs", server, good_texts(1))
    with pytest.raises(UserError, match="is inside the input"):
        augment(dataclasses.replace(options, input=[str(tmp_path / "docs")], output=tmp_path / "docs" / "out"))
    assert not server.bodies and not (tmp_path / "docs" / "out").exists()
