"""Asking rejects again: by reason, with what is kept kept, whenever the run is killed."""

import dataclasses
import itertools
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from augment_runs import records, rejects, shards
from rework_runs import FILTERS, NUM_GOOD, SHORT, as_earlier_version, killed_at, mixed_job, state
from unruly_server import UnrulyServer, unruly_server

from megatron_tpt.errors import UserError
from megatron_tpt.jobs.options import ScaleOptions
from megatron_tpt.thinking.augment import augment, launch
from megatron_tpt.thinking.options import AugmentOptions
from megatron_tpt.thinking.status import status

OF_INPUT = [(9, "duplicate_id"), (10, "empty text")]
ENGINE = [(2, "engine_bad_request"), (11, "engine_bad_request")]
THOUGHTS = [(3, "too_short"), (12, "too_short")]
NUM_ROWS = NUM_GOOD + len(OF_INPUT) + len(ENGINE) + len(THOUGHTS)


@pytest.fixture
def server() -> Iterator[UnrulyServer]:
    with unruly_server() as running:
        yield running


def again(options: AugmentOptions, *reasons: str, **changes: object) -> AugmentOptions:
    return dataclasses.replace(options, retry_rejects=list(reasons), **changes)  # type: ignore[arg-type]


def test_rejects_are_retried_by_reason_and_the_rest_is_kept(server: UnrulyServer, tmp_path: Path) -> None:
    options = mixed_job(tmp_path, server)
    augment(options)
    assert state(options.output)[1] == sorted(ENGINE + OF_INPUT + THOUGHTS)
    untouched = shards(options.output)["part-00000-00001.jsonl.zst"]
    num_asked = len(server.bodies)
    progress = augment(again(options, "engine_bad_request"))
    assert [body["messages"][0]["content"] for body in server.bodies[num_asked:]] == ["400 1 refused", "400 1 last"]
    done, lost = state(options.output)
    assert lost == sorted(OF_INPUT + THOUGHTS) and len(done) == NUM_GOOD + 2
    assert [text for text, _ in done][:3] == ["ok 0 0", "ok 0 1", "400 1 refused"]  # in its place
    assert progress.records == 2 and progress.records_before == NUM_GOOD and progress.rejects.total() == 0
    now = status(options)
    assert (now.records, now.rejects, now.states) == (
        9,
        {"duplicate_id": 1, "empty text": 1, "too_short": 2},
        ["finished"],
    )
    card = (options.output / "README.md").read_text()
    assert "| records | 9 |" in card and "ncomplete" not in card and "engine_bad_request" not in card
    assert shards(options.output)["part-00000-00001.jsonl.zst"] == untouched

    server.answers = {}
    augment(again(options, "too_*"))
    done, lost = state(options.output)
    assert lost == OF_INPUT and len(done) == NUM_ROWS - len(OF_INPUT)
    assert len({record.id for record in records(options.output)}) == len(done)
    by_text = {record.text: record for record in records(options.output)}
    assert by_text["ok 0 short"].meta["sampling"]["attempt"] == 1
    assert "attempt" not in by_text["400 1 refused"].meta["sampling"]
    assert not list((options.output / ".work" / "journal").iterdir())
    assert not list((options.output / ".work" / "retries").iterdir())
    asked = len(server.bodies)
    assert augment(options).records_before == 11 and len(server.bodies) == asked


def test_a_thought_is_asked_for_with_another_seed_and_an_engine_failure_with_its_own(
    server: UnrulyServer, tmp_path: Path
) -> None:
    options = mixed_job(tmp_path, server)
    augment(options)
    augment(again(options, "all"))
    augment(again(options, "too_short"))
    seeds: dict[str, list[int]] = {}
    for body in server.bodies:
        seeds.setdefault(body["messages"][0]["content"], []).append(body["seed"])
    assert len(seeds["ok 0 short"]) == len(set(seeds["ok 0 short"])) == 3  # another one each time
    assert len(seeds["400 1 last"]) == 2 and len(set(seeds["400 1 last"])) == 1
    [reject] = [reject for reject in rejects(options.output) if reject["row"] == 3]
    assert reject["thinking"] == SHORT and reject["generation"]["attempt"] == 2


@pytest.mark.parametrize("is_earlier", [False, True])
def test_of_several_rollouts_and_chunks_only_the_rejected_are_retried(
    server: UnrulyServer, tmp_path: Path, is_earlier: bool
) -> None:
    # 20 characters are a chunk. The server's faults pass; each chunk is asked about in two rollouts.
    chunks = {"good": "ok 0 abcdefghijklmn\n", "failing": "400 1 bcdefghijklmn\n", "short": "ok 0 x y z x y z w\n\n"}
    server.reasoning, server.answers = None, {chunks["short"]: SHORT}
    options = mixed_job(tmp_path, server, long_documents="chunk", max_document_tokens=5, rollouts=2)
    texts = ["".join(chunks[name] for name in names) for names in (["good", "failing", "short"], ["short"], ["good"])]
    server.answers = {chunks["short"]: SHORT}
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    augment(options)
    before = {record.id: record for record in records(options.output)}
    assert sum(reject["reason"] == "engine_bad_request" for reject in rejects(options.output)) == 1
    if is_earlier:
        as_earlier_version(options.output)
    server.answers, num_asked = {}, len(server.bodies)
    augment(again(options, "all"))
    asked = [body["messages"][0]["content"] for body in server.bodies[num_asked:]]
    assert sorted(asked) == sorted([chunks["failing"], *[chunks["short"]] * 4])
    done = {record.id: record for record in records(options.output)}
    assert len(done) == 6 and not rejects(options.output)
    for name, record in before.items():
        new = done[name]
        begins = [0, *(chunk["thinking_end"] for chunk in new.meta["chunks"])]
        thoughts = [(new.thinking or "")[a:b].strip() for a, b in itertools.pairwise(begins)]
        assert all(chunk["reason"] is None for chunk in new.meta["chunks"]) and all(thoughts)
        assert thoughts[0] == f"answer to {chunks['good']}".strip() and record.text == new.text
        lengths = [chunk.get("thinking_tokens") for chunk in new.meta["chunks"]]
        if None in lengths:  # not touched since an earlier version wrote it
            assert is_earlier and len(lengths) == 1
        else:
            assert new.meta["thinking_tokens"] == sum(lengths)
    assert (options.output / "rejects").is_dir() and not list((options.output / "rejects").glob("part-*"))


def test_reasons_that_no_reject_has_are_named_before_anything_is_changed(server: UnrulyServer, tmp_path: Path) -> None:
    options = mixed_job(tmp_path, server)
    augment(options)
    before = shards(options.output)
    with pytest.raises(UserError, match=r"--retry-rejects loop: no reject has this reason; there are: .*too_short 2"):
        augment(again(options, "too_short", "loop"))
    assert shards(options.output) == before and not (options.output / ".work" / "retries").exists()
    asked = len(server.bodies)
    augment(again(options, "duplicate_id"))  # of the input: asking the model again is no use
    assert state(options.output)[1] == sorted(ENGINE + OF_INPUT + THOUGHTS) and len(server.bodies) == asked
    assert "ncomplete" not in (options.output / "README.md").read_text()


def test_tasks_of_another_split_ask_their_share_again_and_the_latest_counts_hold(
    server: UnrulyServer, tmp_path: Path
) -> None:
    first = mixed_job(tmp_path, server, task=1, scale=ScaleOptions(num_tasks=2))
    for task in (0, 1):
        augment(dataclasses.replace(first, task=task))
    one = dataclasses.replace(first, task=None, scale=ScaleOptions())
    augment(again(one, "engine_*"))
    server.answers = {}
    for task in (1, 0):
        augment(again(first, "too_short", task=task))
    assert state(one.output)[1] == OF_INPUT
    card = (one.output / "README.md").read_text()
    assert "| records | 11 |" in card and "ncomplete" not in card


def test_a_task_of_a_round_leaves_the_verdict_to_the_last_one(server: UnrulyServer, tmp_path: Path) -> None:
    whole = mixed_job(
        tmp_path, server, filters=dataclasses.replace(FILTERS, min_words=99), scale=ScaleOptions(num_tasks=2)
    )
    tasks = [dataclasses.replace(whole, task=task) for task in (0, 1)]
    augment(tasks[0])
    with pytest.raises(UserError, match="without a single record"):
        augment(tasks[1])
    launch(again(whole, "too_short"), [sys.executable, "-c", "'a task that is submitted'"])
    assert "2 of 2 tasks not finished" in (whole.output / "README.md").read_text()
    assert augment(again(tasks[0], "too_short")).rejects["too_short"] > 0
    with pytest.raises(UserError, match="without a single record"):
        augment(again(tasks[1], "too_short"))
    assert not list((whole.output / ".work" / "retries").iterdir())


def test_a_round_that_was_interrupted_is_ended_before_another_begins(server: UnrulyServer, tmp_path: Path) -> None:
    options = mixed_job(tmp_path, server)
    augment(options)
    server.status = 401
    with pytest.raises(UserError, match="401"):
        augment(again(options, "too_short"))
    assert "(incomplete)" in (options.output / "README.md").read_text()
    assert len(records(options.output)) == NUM_GOOD  # the old shards are there meanwhile
    server.status = None
    with pytest.raises(UserError, match="--retry-rejects too_short was interrupted here"):
        augment(again(options, "engine_*"))
    server.answers = {}
    augment(options)  # without the option it is ended too
    augment(again(options, "engine_*"))
    assert state(options.output)[1] == OF_INPUT


def test_a_round_that_is_resumed_asks_nothing_twice(server: UnrulyServer, tmp_path: Path) -> None:
    options = mixed_job(tmp_path, server, max_num_seqs=1)
    augment(options)
    num_asked = len(server.bodies)
    server.refuses = lambda body: (401, "expired") if "brief" in str(body) else None
    with pytest.raises(UserError, match="401"):
        augment(again(options, "too_short"))
    server.refuses = lambda body: None
    augment(again(options, "too_short"))
    asked = [body["messages"][0]["content"] for body in server.bodies[num_asked:]]
    assert asked.count("ok 0 short") == 1  # its thought was too short once more, in a block that was finished
    augment(again(options, "too_short"))  # a round of its own
    assert len(server.bodies) == num_asked + len(asked) + 2


@pytest.mark.parametrize("stride", [11])
def test_whenever_it_is_killed_nothing_is_lost_and_nothing_is_there_twice(
    server: UnrulyServer, tmp_path: Path, stride: int
) -> None:
    options = mixed_job(tmp_path, server)
    augment(options)
    shutil.copytree(options.output, tmp_path / "before")
    num_kills = 0
    for call in range(1, 1000, stride):
        shutil.rmtree(options.output)
        shutil.copytree(tmp_path / "before", options.output)
        server.answers = {"ok 0 brief": SHORT}
        if not killed_at(call, lambda: augment(again(options, "too_short", "engine_*")), tmp_path):
            break
        num_kills += 1
        asked = len(server.bodies)
        augment(again(options, "too_short", "engine_*"))
        done, lost = state(options.output)
        assert lost == [*OF_INPUT, (12, "too_short")], call
        assert sorted(text for text, _ in done) == sorted(
            [*(f"ok 0 {i}" for i in range(NUM_GOOD)), "400 1 refused", "400 1 last", "ok 0 short"]
        ), call
        assert len(server.bodies) - asked <= 4, call
        assert "| records | 10 |" in (options.output / "README.md").read_text(), call
        assert not list(options.output.rglob(".tmp-*part-*")), call
    assert not (tmp_path / "child-error").exists(), (tmp_path / "child-error").read_text()
    assert num_kills >= 5


def test_rejects_of_earlier_versions_are_retried(server: UnrulyServer, tmp_path: Path) -> None:
    """They have no lengths of what was rejected, and their ledgers no revisions."""
    options = mixed_job(tmp_path, server)
    augment(options)
    as_earlier_version(options.output)
    server.answers = {}
    augment(again(options, "all"))
    assert state(options.output)[1] == OF_INPUT and len(records(options.output)) == 11
