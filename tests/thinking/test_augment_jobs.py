"""Jobs on a small server of our own: what they do about each other, and about servers that report little."""

import dataclasses
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from augment_runs import NO_FILTERS, good_texts, job, records, rejects
from unruly_server import UnrulyServer, unruly_server

from megatron_tpt.errors import UserError
from megatron_tpt.jobs.lock import TaskLocked
from megatron_tpt.jobs.options import ScaleOptions
from megatron_tpt.thinking.augment import augment, launch
from megatron_tpt.thinking.journal import Journal, Line
from megatron_tpt.thinking.options import AugmentOptions
from megatron_tpt.thinking.shards import Output


@pytest.fixture
def server() -> Iterator[UnrulyServer]:
    with unruly_server() as running:
        yield running


def test_a_server_that_does_not_tell_lengths_has_them_counted_here(server: UnrulyServer, tmp_path: Path) -> None:
    server.usage, server.reasoning = False, None
    options = job(tmp_path, server, good_texts(3))
    with pytest.warns(UserWarning, match="does not report how many tokens"):
        assert augment(options).records == 3
    for record in records(options.output):
        assert record.meta["thinking_tokens"] == -(-len(record.thinking or "") // 4)  # four characters are a token


def test_a_journal_with_lengths_below_zero_is_written_out(server: UnrulyServer, tmp_path: Path) -> None:
    options = job(tmp_path, server, good_texts(3))
    augment(options)
    whole = [vars(record) for record in records(options.output)]
    for path in options.output.glob("part-*"):
        path.unlink()
    journal = Journal(options.output / ".work" / "journal" / "part-00000-00000.jsonl")
    for row, record in enumerate(whole):
        record["meta"] |= {"thinking_tokens": -1}
        journal.add(Line(row, record["id"], [record], []))
    journal.close()
    asked = len(server.bodies)
    augment(options)
    assert len(records(options.output)) == 3 and len(server.bodies) == asked


def test_a_task_that_waited_for_another_run_of_it_asks_nothing_again(server: UnrulyServer, tmp_path: Path) -> None:
    server.delay_s = 0.5
    options = job(tmp_path, server, good_texts(8), max_num_seqs=1, rows_per_shard=2)
    ends: list[Any] = []
    runs = [threading.Thread(target=lambda: ends.append(augment(options))) for _ in range(2)]
    runs[0].start()
    while not server.bodies:
        time.sleep(0.01)
    runs[1].start()
    for run in runs:
        run.join()
    assert sorted(progress.records for progress in ends) == [0, 8]
    assert len(server.bodies) == 8 == len(records(options.output))


def test_another_split_of_a_job_does_not_write_where_one_is_at_work(
    server: UnrulyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = job(tmp_path, server, good_texts(8), rows_per_shard=2)
    path = options.output / ".work" / "journal" / "part-00000-00001.jsonl"
    monkeypatch.setattr("megatron_tpt.thinking.journal._LOCK_TIMEOUT_S", 0.5)
    other = Journal(path)
    other.add_answer(2, 0, {"text": "of the other"})
    with pytest.raises(TaskLocked, match=r"part-00000-00001.*--num-tasks"):
        augment(options)
    assert json.loads(path.read_text())["answer"] == {"text": "of the other"}
    other.remove()
    assert augment(options).shards_skipped <= 1  # the first block may be done
    assert len(records(options.output)) == 8


def test_what_another_run_has_finished_meanwhile_is_not_begun_again(server: UnrulyServer, tmp_path: Path) -> None:
    options = job(tmp_path, server, good_texts(8), rows_per_shard=2)
    before = Output(options.output)
    augment(options)
    assert not before.is_done("part-00000-00001")
    assert before.journal("part-00000-00001") is None
    assert not list(before.journals.iterdir())
    (options.output / "part-00000-00001.jsonl.zst").unlink()
    assert before.journal("part-00000-00001") is not None
    before.close()


def test_the_journal_keeps_answers_on_the_disk_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    for row in range(2):
        for request in range(3):
            journal.add_answer(row, request, {"text": f"{row} {request}" + "x" * 100_000})
    journal.add(Line(0, "a", [], []))
    journal.close()
    again = Journal(tmp_path / "journal.jsonl")
    assert again.answer(1, 2) == {"text": "1 2" + "x" * 100_000}
    assert again.answer(0, 2) is None and again.answer(1, 3) is None
    held = [value for value in vars(again).values() if isinstance(value, dict)]
    assert len(repr(held)) < 1000 and sum(map(len, held)) == 2


def test_no_mistake_of_the_user_is_found_after_something_was_written(server: UnrulyServer, tmp_path: Path) -> None:
    options = job(tmp_path, server, good_texts(2), tokenizer=str(tmp_path / "nowhere"))
    with pytest.raises(UserError):
        augment(options)
    assert not options.output.exists()


def card(options: AugmentOptions) -> str:
    return (options.output / "README.md").read_text(encoding="utf-8")


def test_a_block_that_was_killed_at_its_very_end_is_counted_once(
    server: UnrulyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(journal: Journal) -> None:
        raise Killed

    options = job(tmp_path, server, [*good_texts(9), " "])
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Journal, "remove", kill)
        augment(options)
    assert not (options.output / "README.md").exists()
    augment(options)
    assert "| records | 9 |" in card(options) and "| thinking that was rejected | 1 (10.0%) |" in card(options)
    assert "| device hours of the generator" in card(options) and "ncomplete" not in card(options)


def test_the_card_is_final_only_when_every_task_has_come_to_its_end(server: UnrulyServer, tmp_path: Path) -> None:
    options = job(tmp_path, server, good_texts(9), rows_per_shard=2, scale=ScaleOptions(num_tasks=2))
    launch(options, [sys.executable, "-c", "'a task that is submitted, and has not begun'"])
    assert "# Documents with thinking (incomplete)" in card(options) and "2 of 2 tasks not finished" in card(options)
    assert "size_categories" not in card(options)
    augment(dataclasses.replace(options, task=1))
    assert "2 of 2 tasks not finished" in card(options)  # as of the submission: tasks do not read all ledgers
    augment(dataclasses.replace(options, task=0))
    assert "| records | 9 |" in card(options) and "ncomplete" not in card(options)
    (options.output / "part-00000-00003.jsonl.zst").unlink()
    launch(options, [sys.executable, "-c", ""])
    assert "1 finished shard missing or damaged" in card(options) and "| records | 7 |" in card(options)
    augment(dataclasses.replace(options, scale=ScaleOptions()))  # in another split
    assert "| records | 9 |" in card(options) and "ncomplete" not in card(options)


def test_a_chunk_that_comes_to_nothing_is_a_reject_of_its_own_and_the_others_stay(
    server: UnrulyServer, tmp_path: Path
) -> None:
    # 20 characters are a chunk, and what a chunk begins with makes the server to misbehave.
    chunks = {"good": "ok 0 abcdefghijklmn\n", "failing": "400 9 bcdefghijklmn\n", "short": "ok 0 x y z x y z w\n\n"}
    documents = [["good", "failing", "short", "good"], ["failing", "short"], ["good", "good"], ["failing"]]
    filters = dataclasses.replace(NO_FILTERS, min_words=5)
    texts = ["".join(chunks[name] for name in names) for names in documents]
    server.reasoning, server.answers = None, {chunks["short"]: "few words"}
    options = job(
        tmp_path,
        server,
        texts,
        long_documents="chunk",
        max_document_tokens=5,
        filters=filters,
    )
    progress = augment(options)
    first, second = records(options.output)
    assert [chunk["reason"] for chunk in first.meta["chunks"]] == [None, "engine_bad_request", "too_short", None]
    assert (first.thinking or "").count("answer to") == 2 and first.meta["finish_reason"] == "stop"
    lost = rejects(options.output)
    assert [(reject["row"], reject["chunk"], reject["reason"], reject["thinking"]) for reject in lost] == [
        (0, 1, "engine_bad_request", None),
        (0, 2, "too_short", "few words"),
        (1, None, "engine_bad_request", None),
        (1, 0, "engine_bad_request", None),
        (1, 1, "too_short", "few words"),
        (3, None, "engine_bad_request", None),
    ]
    assert lost[0]["detail"] and second.meta["chunks"][0]["reason"] is None
    of_rows = [reject for reject in lost if reject["chunk"] is None]
    assert progress.records + progress.rejects.total() == len(records(options.output)) + len(of_rows) == len(documents)
    assert progress.chunk_rejects == {"engine_bad_request": 2, "too_short": 2}
    assert "| records | 2 |" in card(options) and "| thinking that was rejected | 2 (50.0%) |" in card(options)
    assert "chunks of documents by reason" in card(options) and "| too_short | 2 |" in card(options)
