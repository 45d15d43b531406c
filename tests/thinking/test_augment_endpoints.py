"""tools/augment.py on chat endpoints, played by a server that needs no model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from augment_runs import options_for, records, write_documents
from unruly_server import MODEL, UnrulyServer, unruly_server

from megatron_tpt.errors import Fault, UserError
from megatron_tpt.scale import ScaleOptions
from megatron_tpt.thinking.augment import augment
from megatron_tpt.thinking.options import AugmentOptions


@pytest.fixture
def server() -> Iterator[UnrulyServer]:
    with unruly_server() as server:
        yield server


def chat_options(server: UnrulyServer, documents: Path, output: Path, **changes: object) -> AugmentOptions:
    chat = {"engine": "endpoint", "api": "chat", "endpoints": [server.url]}
    return options_for(documents, MODEL, output, **chat | changes)


def test_a_machine_that_lacks_what_the_others_have_is_a_fault(server: UnrulyServer, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_documents(
            tmp_path / "in" / f"{name}.jsonl", ({"id": f"{name}{i}", "text": f"ok 0 {i}"} for i in range(3))
        )
    tasks = [
        chat_options(server, tmp_path / "in", tmp_path / "out", task=task, scale=ScaleOptions(num_tasks=2))
        for task in (0, 1)
    ]
    (tmp_path / "in").rename(tmp_path / "away")
    with pytest.raises(UserError, match="no such file or folder"):  # so for all, as far as one can know
        augment(tasks[0])
    (tmp_path / "away").rename(tmp_path / "in")
    augment(tasks[0])
    (tmp_path / "in").rename(tmp_path / "away")
    with pytest.raises(Fault, match=r"no such file or folder.*when the job began this was in order"):
        augment(tasks[1])
    (tmp_path / "away").rename(tmp_path / "in")
    augment(tasks[1])
    assert len(records(tmp_path / "out")) == 6
