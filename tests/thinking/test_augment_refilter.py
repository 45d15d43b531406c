"""Other filters for what was generated: the folder is then as if they had been there from the beginning."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from augment_runs import NO_FILTERS, records, rejects, shards
from rework_runs import FILTERS, SHORT, as_earlier_version, killed_at, mixed_job, state
from unruly_server import UnrulyServer, unruly_server

from megatron_tpt.errors import UserError
from megatron_tpt.thinking.augment import apply_filters, augment
from megatron_tpt.thinking.filter_options import FilterOptions
from megatron_tpt.thinking.options import AugmentOptions
from megatron_tpt.thinking.status import status

STRICT = dataclasses.replace(NO_FILTERS, min_words=500)


@pytest.fixture
def server() -> Iterator[UnrulyServer]:
    with unruly_server() as running:
        yield running


def with_filters(options: AugmentOptions, filters: FilterOptions, *, apply: bool = True) -> AugmentOptions:
    return dataclasses.replace(options, filters=filters, refilter=apply)


def lines(output: Path) -> list[dict[str, Any]]:
    return [vars(record) for record in records(output)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rollouts": 2},
        {"long_documents": "chunk", "max_document_tokens": 3},
        {"long_documents": "chunk", "max_document_tokens": 3, "rollouts": 2},
    ],
)
def test_other_filters_make_what_they_would_have_made_from_the_beginning(
    server: UnrulyServer, tmp_path: Path, changes: dict[str, Any]
) -> None:
    changes = {"max_num_seqs": 1, **changes}  # in both jobs the server refuses the same of several rollouts
    options = mixed_job(tmp_path / "job", server, **changes)
    augment(options)
    first, lost = lines(options.output), state(options.output)[1]
    server._asked.clear()  # its faults come again
    loose = dataclasses.replace(
        mixed_job(tmp_path / "loose", server, **changes), filters=NO_FILTERS,
        input=options.input, prompt=options.prompt,
    )  # fmt: skip
    augment(loose)
    asked = len(server.bodies)
    progress = apply_filters(with_filters(options, NO_FILTERS))
    assert lines(options.output) == lines(loose.output) and state(options.output) == state(loose.output)
    assert len(records(options.output)) == progress.records_before > len(first)
    assert json.loads((options.output / "augment.json").read_text())["filters"]["min_words"] == 0
    card = (options.output / "README.md").read_text()
    assert f"| records | {progress.records_before} |" in card and '"min_words": 0' in card and "too_short" not in card
    assert status(options).records == progress.records_before
    with pytest.raises(UserError, match="without a single record"):
        apply_filters(with_filters(options, STRICT))
    assert not shards(options.output)
    apply_filters(with_filters(options, FILTERS))
    assert lines(options.output) == first and state(options.output)[1] == lost
    assert len(server.bodies) == asked  # all that time nothing was generated
    assert augment(options).records == 0 and len(server.bodies) == asked


def test_a_job_all_of_whose_thoughts_were_rejected_is_saved(server: UnrulyServer, tmp_path: Path) -> None:
    options = mixed_job(tmp_path, server, filters=STRICT)
    with pytest.raises(UserError, match="--refilter"):
        augment(options)
    with pytest.raises(UserError, match=r"other --filters.*--refilter"):
        augment(with_filters(options, FILTERS, apply=False))
    apply_filters(with_filters(options, FILTERS))
    assert len(records(options.output)) == 7
    rejects_of_now = [reject["reason"] for reject in rejects(options.output)]
    assert rejects_of_now.count("too_short") == 2 and rejects_of_now.count("engine_bad_request") == 2


def test_a_job_that_was_interrupted_is_filtered_as_far_as_it_is_and_resumed(
    server: UnrulyServer, tmp_path: Path
) -> None:
    options = mixed_job(tmp_path, server, filters=STRICT, max_num_seqs=1, rollouts=3)
    server.refuses = lambda body: (401, "key expired") if len(server.bodies) > 20 else None
    with pytest.raises(UserError, match="401"):
        augment(options)
    assert list((options.output / ".work" / "journal").iterdir())
    apply_filters(with_filters(options, FILTERS))
    assert (
        not list(options.output.glob(".work/refilter*")) and "ncomplete" in (options.output / "README.md").read_text()
    )
    num_asked, server.refuses = len(server.bodies), lambda body: None
    with pytest.raises(UserError, match="begun with other --filters"):
        augment(options)
    augment(with_filters(options, FILTERS, apply=False))
    assert len(records(options.output)) >= 7 * 3
    assert all(reject["reason"] != "loop" for reject in rejects(options.output))
    assert len(server.bodies) - num_asked <= 33 - 18  # what was answered is not requested again


def test_only_the_filters_may_differ_and_no_task_may_run(server: UnrulyServer, tmp_path: Path) -> None:
    from megatron_tpt.jobs.lock import task_lock

    options = mixed_job(tmp_path, server)
    with pytest.raises(UserError, match="no job was begun here"):
        apply_filters(with_filters(options, NO_FILTERS))
    augment(options)
    before = shards(options.output)
    with pytest.raises(UserError, match="seed differ"):
        apply_filters(dataclasses.replace(with_filters(options, NO_FILTERS), seed=3))
    with task_lock(options.output / ".work" / "locks", 3), pytest.raises(UserError, match="task 3 is running"):
        apply_filters(with_filters(options, NO_FILTERS))
    assert shards(options.output) == before
    assert augment(options).records == 0  # the folder is open to others


def test_what_earlier_versions_generated_is_refused_where_it_lacks_lengths(
    server: UnrulyServer, tmp_path: Path
) -> None:
    options = mixed_job(tmp_path, server)
    augment(options)
    as_earlier_version(options.output)
    before, settings = shards(options.output), (options.output / "augment.json").read_text()
    with pytest.raises(UserError, match="an earlier version generated this"):
        apply_filters(with_filters(options, NO_FILTERS))
    assert shards(options.output) == before and (options.output / "augment.json").read_text() == settings


@pytest.mark.parametrize("stride", [15])
def test_whenever_it_is_killed_it_is_ended_by_doing_it_again(server: UnrulyServer, tmp_path: Path, stride: int) -> None:
    options = mixed_job(tmp_path, server)
    augment(options)
    shutil.copytree(options.output, tmp_path / "before")
    new = with_filters(options, NO_FILTERS)
    num_kills = 0
    for call in range(1, 1000, stride):
        shutil.rmtree(options.output)
        shutil.copytree(tmp_path / "before", options.output)
        if not killed_at(call, lambda: apply_filters(new), tmp_path):
            break
        num_kills += 1
        if (options.output / ".work" / "refilter.json").exists():
            for filters in (FILTERS, NO_FILTERS):
                with pytest.raises(UserError, match="--refilter was interrupted here"):
                    augment(with_filters(options, filters, apply=False))
            assert "other filters are being applied" in status(options).screen()
        apply_filters(new)
        assert [reject["reason"] for reject in rejects(options.output)].count("too_short") == 0, call
        assert len(records(options.output)) == 9 == len({record.id for record in records(options.output)}), call
        assert "| records | 9 |" in (options.output / "README.md").read_text(), call
    assert not (tmp_path / "child-error").exists(), (tmp_path / "child-error").read_text()
    assert num_kills >= 5 and SHORT in {record.thinking for record in records(options.output)}
