"""Finished shards that are no longer what was written are done again, and the card counts what is there."""

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from augment_runs import good_texts, job, records, shards
from rework_runs import mixed_job
from unruly_server import UnrulyServer, unruly_server

from megatron_tpt.errors import UserError
from megatron_tpt.thinking.augment import apply_filters, augment
from megatron_tpt.thinking.options import AugmentOptions

SECOND = "part-00000-00001.jsonl.zst"


@pytest.fixture
def server() -> Iterator[UnrulyServer]:
    with unruly_server() as running:
        yield running


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def delete(path: Path) -> None:
    path.unlink()


def num_records_in_card(options: AugmentOptions) -> int:
    found = re.search(r"\| records \| (\d+) \|", (options.output / "README.md").read_text())
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize("damage", [empty, truncate, delete])
def test_a_damaged_shard_is_done_again_and_no_other(
    server: UnrulyServer, tmp_path: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    options = job(tmp_path, server, good_texts(6), rows_per_shard=2)
    augment(options)
    before, num_asked = shards(options.output), len(server.bodies)
    damage(options.output / SECOND)
    augment(options)
    assert f"warning: {options.output / SECOND}: " in capsys.readouterr().err
    assert shards(options.output).keys() == before.keys()
    assert len(records(options.output)) == num_records_in_card(options) == 6
    assert len(server.bodies) == num_asked + 2
    augment(options)
    assert len(server.bodies) == num_asked + 2


def test_rejects_that_are_missing_are_retried_although_their_shard_is_there(
    server: UnrulyServer, tmp_path: Path
) -> None:
    options = mixed_job(tmp_path, server)
    augment(options)
    rejects = sorted((options.output / "rejects").glob("part-*"))
    before = {path.name: path.read_bytes() for path in rejects}
    rejects[0].unlink()
    augment(options)
    assert {path.name for path in (options.output / "rejects").glob("part-*")} == before.keys()


def test_a_shard_of_other_content_is_not_judged_by_other_filters(server: UnrulyServer, tmp_path: Path) -> None:
    options = mixed_job(tmp_path, server)
    augment(options)
    path = options.output / SECOND
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    new = dataclasses.replace(options, filters=dataclasses.replace(options.filters, min_words=500))
    with pytest.raises(UserError, match=f"{SECOND}: holds something other than what the job that wrote it recorded"):
        apply_filters(new)


def test_a_job_of_an_earlier_version_is_taken_as_it_is(server: UnrulyServer, tmp_path: Path) -> None:
    options = job(tmp_path, server, good_texts(4), rows_per_shard=2)
    augment(options)
    for path in (options.output / ".inventory").iterdir():
        path.unlink()
    num_asked = len(server.bodies)
    augment(options)
    assert len(server.bodies) == num_asked and num_records_in_card(options) == 4
