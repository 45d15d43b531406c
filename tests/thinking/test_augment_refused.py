"""Jobs of which nothing comes, as of servers that refuse everything; options that have no effect."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from augment_runs import NO_FILTERS, command, good_texts, job, options_for, records, rejects
from unruly_server import MODEL, UnrulyServer, unruly_server

from megatron_tpt.errors import UserError
from megatron_tpt.jobs.options import ScaleOptions
from megatron_tpt.thinking.augment import augment
from megatron_tpt.thinking.filter_options import FilterOptions
from megatron_tpt.thinking.options import AugmentOptions
from megatron_tpt.thinking.status import status

TOO_LONG = "This model's maximum context length is 4096 tokens. However, you requested 8200 tokens."


@pytest.fixture
def server() -> Iterator[UnrulyServer]:
    with unruly_server() as running:
        yield running


def permanent(output: Path) -> list[str]:
    """What says that something is done."""
    names = ("part-*", "rejects/*", ".work/finished/*", ".work/ledger/*", "README.md")
    return [str(path) for name in names for path in output.glob(name)]


def test_what_is_done_at_bad_records_may_change_in_an_unfinished_job(server: UnrulyServer, tmp_path: Path) -> None:
    texts = [*good_texts(6), " ", *good_texts(2)]
    with pytest.raises(UserError, match=r"in\.jsonl:7: empty text; .*--on-bad-record skip"):
        augment(job(tmp_path, server, texts, rows_per_shard=2, on_bad_record="stop"))
    progress = augment(job(tmp_path, server, texts, rows_per_shard=2))
    assert (progress.records + progress.records_before, progress.rejects["empty text"]) == (6, 1)
    augment(job(tmp_path, server, texts, rows_per_shard=2, on_bad_record="stop"))  # nothing is left to do


@pytest.mark.parametrize("status_code,sentence", [(400, "Unsupported parameter: 'max_tokens'"), (422, TOO_LONG)])
@pytest.mark.parametrize("changes", [{}, {"rollouts": 2}, {"max_num_seqs": 1}])
def test_a_server_that_refuses_everything_leaves_nothing_done_and_other_settings_can_follow(
    server: UnrulyServer, tmp_path: Path, status_code: int, sentence: str, changes: dict[str, Any]
) -> None:
    server.refuses = lambda body: (status_code, sentence) if "max_tokens" in body else None
    texts = [*good_texts(10), " ", *(f"ok 0 more {i}" for i in range(90))]  # one of them is no document
    with pytest.raises(UserError, match=f"refuses every request.*{sentence}"):
        augment(job(tmp_path, server, texts, **changes))
    assert not permanent(tmp_path / "out") and len(server.bodies) < 150
    again = job(tmp_path, server, texts, length_field="max_completion_tokens", **changes)
    progress = augment(again)
    assert progress.records == len(records(again.output)) == 100 * changes.get("rollouts", 1)
    assert progress.rejects == {"empty text": 1}
    assert json.loads((again.output / "augment.json").read_text())["length_field"] == "max_completion_tokens"


def test_a_server_that_begins_to_refuse_everything_costs_no_document(server: UnrulyServer, tmp_path: Path) -> None:
    server.refuses = lambda body: "model not found" if len(server.bodies) > 12 else None
    options = job(tmp_path, server, good_texts(30), max_num_seqs=2, rows_per_shard=4)
    with pytest.raises(UserError, match=r"now refuses every request.*model not found"):
        augment(options)
    assert not rejects(options.output) and len(records(options.output)) >= 8
    server.refuses = lambda body: None
    progress = augment(options)
    assert progress.records + progress.records_before == 30 == len(records(options.output))
    with pytest.raises(UserError, match="started with other settings"):  # of this one something has come
        augment(job(tmp_path, server, good_texts(30), max_num_seqs=2, rows_per_shard=4, seed=1))


def test_the_last_documents_may_be_refused_where_only_they_are_left(server: UnrulyServer, tmp_path: Path) -> None:
    options = job(tmp_path, server, [*good_texts(5), "400 9 a", "long 9 b"], rows_per_shard=2)
    assert augment(options).rejects == {"engine_bad_request": 1, "engine_prompt_too_long": 1}
    (options.output / "rejects" / "part-00000-00003.jsonl.zst").unlink()
    assert augment(options).rejects == {"engine_prompt_too_long": 1}  # nothing was completed in this run


@pytest.mark.parametrize("num_texts", [1, 20, 200])
@pytest.mark.parametrize("fault", ["400 99", "long 99", "filtered 99"])
def test_failures_before_anything_was_completed_are_no_rejects(
    server: UnrulyServer, tmp_path: Path, num_texts: int, fault: str
) -> None:
    """Here the server answers a short test, and refuses what all documents have in common."""
    texts = [" ", *(f"{fault} {i}" for i in range(num_texts))]
    with pytest.raises(UserError, match=r"not one request has been completed for this job, and \d+ have failed"):
        augment(job(tmp_path, server, texts))
    assert not permanent(tmp_path / "out") and len(server.bodies) < 150
    server._asked.update({text: 99 for text in texts})
    assert augment(job(tmp_path, server, texts, seed=5)).records == num_texts


def test_a_job_whose_thoughts_are_all_rejected_says_why_and_is_not_done(server: UnrulyServer, tmp_path: Path) -> None:
    server.reasoning, server.answers = None, {"ok 0 0": "no", "ok 0 1": "", "ok 0 2": "nein"}
    options = job(tmp_path, server, [*good_texts(3), "400 9 x"], filters=FilterOptions(min_words=3))
    line = command(options, "--engine", "endpoint", "--api", "chat", "--endpoints", server.url, "--prompt",
                   options.prompt)  # fmt: skip
    first, again = (subprocess.run(line, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == again.returncode == 2
    for said in (
        first.stderr,
        again.stderr,
        subprocess.run([*line, "--status"], capture_output=True, text=True).stdout,
    ):
        assert f'rejected as too_short: 3 (75.0%), such as {tmp_path}/in.jsonl:1: "no"' in said
        assert "rejected as engine_bad_request: 1 (25.0%), such as" in said
        assert "without a single record" in said and "--refilter" in said and "--retry-rejects" in said
    assert "nothing to do" in again.stderr


def test_a_job_of_several_tasks_is_judged_as_a_whole(server: UnrulyServer, tmp_path: Path) -> None:
    server.reasoning, server.answers = None, {text: "no" for text in good_texts(4)}
    changes: dict[str, Any] = {"rows_per_shard": 2, "filters": FilterOptions(min_words=3)}
    tasks = [
        job(tmp_path, server, good_texts(4), task=task, scale=ScaleOptions(num_tasks=2), **changes) for task in (0, 1)
    ]
    assert augment(tasks[0]).rejects == {"too_short": 2}  # for all it knows, the others do better
    with pytest.raises(UserError, match="without a single record: all 4 documents"):
        augment(tasks[1])
    server.answers = {}
    augment(job(tmp_path / "good", server, good_texts(3), **changes))
    assert status(job(tmp_path / "good", server, good_texts(3), **changes)).records == 3


def test_a_finished_job_names_the_next_command(
    server: UnrulyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = job(tmp_path, server, good_texts(3))
    augment(options)
    assert (
        f"3 records. Next: python tools/index.py --input {options.output}" in capsys.readouterr().err.splitlines()[-1]
    )
    known = subprocess.run([sys.executable, "tools/index.py", "--help"], capture_output=True, text=True).stdout
    assert all(option in known for option in ("--input", "--tokenizer", "--output"))


def test_a_job_is_warned_of_early_where_nothing_comes_of_it(
    server: UnrulyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.reasoning = None
    options = job(tmp_path, server, good_texts(130), filters=FilterOptions(min_words=50), rows_per_shard=200)
    with pytest.raises(UserError, match="without a single record"):
        augment(options)
    said = capsys.readouterr().err
    assert said.count("warning: not one record so far") == 1
    assert "warning: rejected as too_short: 100 (100.0%), such as" in said


@pytest.mark.parametrize(
    "given,message",
    [
        ({"length_field": "max_completion_tokens"}, "--length-field has no effect with --engine transformers"),
        ({"omit_fields": [["seed"]]}, "--omit-fields has no effect"),
        ({"request_field": [["top_k=1"]]}, "--request-field top_k has no effect with --engine transformers"),
        ({"api_key_env": "KEY"}, "--api-key-env has no effect"),
        ({"request_timeout_s": 5.0}, "--request-timeout-s has no effect"),
        ({"hang_timeout_s": 5.0}, "--hang-timeout-s has no effect"),
        ({"num_engines": 2}, "--num-engines has no effect"),
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size has no effect"),
        ({"status": True, "refilter": True}, "--status and --refilter"),
        ({"estimate": 5, "retry_rejects": ["all"]}, "--estimate and --retry-rejects"),
    ],
)
def test_options_without_effect_are_refused_by_name(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        options_for(tmp_path, MODEL, tmp_path / "out", engine="transformers", **given)


@pytest.mark.parametrize(
    "given,message",
    [
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size has no effect with --engine endpoint"),
        ({"hang_timeout_s": 5.0}, "--hang-timeout-s has no effect"),
        ({"temperature": 0.5, "omit_fields": [["temperature"]]}, "--temperature has no effect with --omit-fields"),
        ({"top_p": 0.5, "omit_fields": [["seed"], ["top_p"]]}, "--top-p has no effect with --omit-fields"),
    ],
)
def test_options_without_effect_at_endpoints_are_refused_by_name(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    endpoint: dict[str, Any] = {"engine": "endpoint", "endpoints": ["http://h/v1"], "temperature": 0.6}
    with pytest.raises(UserError, match=message):
        options_for(tmp_path, MODEL, tmp_path / "out", **endpoint | given)


def test_what_a_job_cannot_drop_again_is_said(
    server: UnrulyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are among its settings: a job that was begun with them could not be resumed without."""
    augment(job(tmp_path, server, good_texts(2), dtype="bfloat16", thinking_block="open", temperature=0.0, top_p=0.5))
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert [note.split()[1] for note in notes] == ["--dtype", "--thinking-block", "--top-p"]


def test_columns_that_are_not_kept_are_said(
    server: UnrulyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = job(tmp_path, server, good_texts(2))
    path = Path(options.input[0])
    path.write_text("".join(json.dumps(json.loads(line) | {"url": "u"}) + "\n" for line in path.open()))
    augment(options)
    assert f"note: not kept: url (first seen in {path}); --meta-columns keeps" in capsys.readouterr().err
    augment(dataclasses.replace(options, meta_columns=["url"], output=tmp_path / "kept"))
    assert "not kept" not in capsys.readouterr().err


def test_request_fields_are_settings_of_the_job_and_what_is_omitted_is_not_claimed(
    server: UnrulyServer, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"request_field": [['chat_template_kwargs={"enable_thinking": false}'], ["top_k=20"]]}
    given |= {"omit_fields": [["temperature"]], "temperature": 0.6}
    options = job(tmp_path, server, good_texts(2), **given)
    augment(options)
    assert all(body["top_k"] == 20 and "temperature" not in body for body in server.bodies)
    assert server.bodies[0]["chat_template_kwargs"] == {"enable_thinking": False}
    assert records(options.output)[0].meta["sampling"]["temperature"] is None
    assert '"top_k": 20' in (options.output / "README.md").read_text()
    with pytest.raises(UserError, match=r"request_fields was .*enable_thinking"):
        augment(job(tmp_path, server, good_texts(2), **given | {"request_field": []}))


def test_notes_are_empty_for_what_has_effect(tmp_path: Path) -> None:
    plain: AugmentOptions = options_for(tmp_path, MODEL, tmp_path / "out", filters=NO_FILTERS)
    assert plain.notes() == []
