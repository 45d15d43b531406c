"""tools/augment.py on chat endpoints, played by a server that needs no model."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from augment_runs import good_texts, job, options_for, records, rejects, write_documents
from tiny_models import CHAT_TEMPLATE, make_model
from unruly_server import MODEL, UnrulyServer, unruly_server

from megatron_tpt.errors import Fault, UserError
from megatron_tpt.generation import load_tokenizer
from megatron_tpt.jobs.options import ScaleOptions
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
    with pytest.raises(UserError, match="no such file or folder"):  # so for all tasks, as it seems
        augment(tasks[0])
    (tmp_path / "away").rename(tmp_path / "in")
    augment(tasks[0])
    (tmp_path / "in").rename(tmp_path / "away")
    with pytest.raises(Fault, match=r"no such file or folder.*when the job began this was right"):
        augment(tasks[1])
    (tmp_path / "away").rename(tmp_path / "in")
    augment(tasks[1])
    assert len(records(tmp_path / "out")) == 6


@pytest.mark.parametrize("thinks,num_tokens", [("aloud", 3), ("apart", 3), ("", 5)])
def test_a_chat_model_is_stopped_at_the_end_of_its_thinking(
    server: UnrulyServer, tmp_path: Path, thinks: Any, num_tokens: int
) -> None:
    server.thinks = thinks
    documents = write_documents(tmp_path / "documents.jsonl", ({"id": f"d{i}", "text": f"ok 0 {i}"} for i in range(4)))
    progress = augment(chat_options(server, documents, tmp_path / "out"))
    assert all(body["stop"] == ["</think>"] for body in server.bodies)
    done = records(tmp_path / "out")
    assert [record.thinking for record in done] == ["why heat flows" if thinks else "hm"] * 4
    assert {record.meta["truncated"] for record in done} == {False}
    assert progress.thinking_tokens == 4 * num_tokens


def test_a_server_that_takes_no_stop_texts_is_asked_without(
    server: UnrulyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.thinks, server.takes_stop = "aloud", False
    documents = write_documents(tmp_path / "documents.jsonl", ({"id": f"d{i}", "text": f"ok 0 {i}"} for i in range(40)))
    progress = augment(chat_options(server, documents, tmp_path / "out", max_num_seqs=2))
    assert [record.thinking for record in records(tmp_path / "out")] == ["why heat flows"] * 40
    assert progress.thinking_tokens == 40 * 7
    assert len(server.bodies) <= 42  # the first at each of two places were asked twice
    assert "takes no stop texts" in capsys.readouterr().err


@pytest.mark.parametrize("opens", [True, False])
def test_thoughts_that_were_cut_are_no_rephrased_text(server: UnrulyServer, tmp_path: Path, opens: bool) -> None:
    """Some chat templates open the thinking whether or not it is wanted."""
    template = CHAT_TEMPLATE.replace("<|assistant|>\n", "<|assistant|>\n<think>\n" if opens else "<|assistant|>\n")
    model = make_model(tmp_path / "model", context=1024, chat_template=template)
    documents = write_documents(tmp_path / "documents.jsonl", [{"id": "d", "text": "Heat flows."}])
    cut: dict[str, Any] = {"api": "completions", "prompt": "rephrase", "tokenizer": model}
    options = chat_options(server, documents, tmp_path / "out", **cut)
    # The server ends every completion at the limit, without a tag.
    with pytest.raises(UserError, match="without a single record") if opens else contextlib.nullcontext():
        augment(options)
    assert len(records(options.output)) == (not opens)
    assert len(rejects(options.output)) == opens


def test_the_prompt_made_here_has_the_arguments_of_the_chat_template(server: UnrulyServer, tmp_path: Path) -> None:
    tokenizer = tmp_path / "model"
    make_model(tokenizer, context=1024, chat_template=CHAT_TEMPLATE + "{{ effort }}")
    base = {"api": "completions", "tokenizer": str(tokenizer)}
    options = job(tmp_path, server, good_texts(1), request_field=[['chat_template_kwargs={"effort": "zzz"}']], **base)
    augment(options)
    [body] = server.bodies
    assert "zzz" in load_tokenizer(str(tokenizer)).decode(body["prompt"]) and "chat_template_kwargs" not in body
