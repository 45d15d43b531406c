"""tools/augment.py from documents to shards, on the real vLLM engine with a tiny model."""

import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from augment_runs import NO_FILTERS, TOOL, command, options_for, records, rejects, run_tool, shards, write_documents
from tiny_models import CHAT_TEMPLATE, make_model, make_tokenizer, unchanged_environment

from megatron_tpt.config.cli import parse
from megatron_tpt.errors import UserError
from megatron_tpt.generation import load_tokenizer
from megatron_tpt.records import Record, content_id, read_records
from megatron_tpt.thinking.augment import augment
from megatron_tpt.thinking.estimate import estimate
from megatron_tpt.thinking.options import AugmentOptions
from megatron_tpt.thinking.prompts import FOCUS_MARK

NUM_DOCUMENTS = 23


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    with unchanged_environment():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(
        tmp_path_factory.mktemp("documents") / "documents.jsonl",
        ({"text": f"Document {i}: {'one more ' * i}\n", "title": f"no. {i}"} for i in range(NUM_DOCUMENTS)),
    )


@pytest.fixture(scope="module")
def finished(
    documents: Path, model: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[AugmentOptions, list[Record]]:
    options = options_for(documents, model, tmp_path_factory.mktemp("finished") / "out")
    progress = augment(options)
    assert (progress.records, progress.shards, progress.shards_skipped) == (NUM_DOCUMENTS, 5, 0)
    return options, records(options.output)


def test_every_document_becomes_one_record_in_its_place(finished: tuple[AugmentOptions, list[Record]]) -> None:
    options, done = finished
    assert sorted(shards(options.output)) == [f"part-00000-{i:05d}.jsonl.zst" for i in range(5)]
    texts = [record.text for record in read_records(options.input)]
    assert [record.text for record in done] == texts
    assert [record.id for record in done] == [content_id(text) for text in texts]
    assert list(read_records([options.output])) == done  # nothing else in the folder reads as records
    assert not list((options.output / ".work" / "journal").iterdir())


def test_records_say_how_their_thinking_came_about(
    finished: tuple[AugmentOptions, list[Record]], documents: Path, model: str
) -> None:
    _, done = finished
    tokenizer = load_tokenizer(model)
    for record in done:
        meta = record.meta
        assert meta["source"] == str(documents)
        assert meta["generator"] == model
        assert meta["prompt"] == "expert"
        assert meta["sampling"] == {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 40, "seed": 0}
        assert meta["document_tokens"] == len(tokenizer(record.text).input_ids)
        assert meta["truncated"] == (meta["finish_reason"] == "length")
        assert meta["thinking_tokens"] == 40 if meta["truncated"] else meta["thinking_tokens"] < 40
        assert "</think>" not in (record.thinking or "")
        assert "title" not in meta
    assert len({record.thinking for record in done}) > 20
    assert max(record.meta["document_tokens"] for record in done) > 50  # the text is whole, the prompt was not


def test_again_it_writes_only_what_is_missing(
    finished: tuple[AugmentOptions, list[Record]], capsys: pytest.CaptureFixture[str]
) -> None:
    options, _ = finished
    before = shards(options.output)
    untouched = {name: (options.output / name).stat().st_mtime_ns for name in before}
    (options.output / "part-00000-00002.jsonl.zst").unlink()
    (options.output / "part-00000-00004.jsonl.zst").unlink()
    progress = augment(options)
    assert (progress.records, progress.shards, progress.shards_skipped) == (8, 2, 3)
    assert shards(options.output) == before
    for i in (0, 1, 3):
        name = f"part-00000-0000{i}.jsonl.zst"
        assert (options.output / name).stat().st_mtime_ns == untouched[name]

    capsys.readouterr()
    assert augment(options).records == 0
    assert "nothing to do" in capsys.readouterr().err  # and no engine was started


def test_other_settings_are_refused(finished: tuple[AugmentOptions, list[Record]]) -> None:
    options, _ = finished
    for change, message in [
        ({"temperature": 0.5}, "temperature was 1.0, now 0.5"),
        ({"limit": 3}, "limit was null, now 3"),
        ({"seed": 1, "top_p": 1.0}, "top_p was 0.9, now 1.0; seed was 0, now 1"),
        ({"rollouts": 2}, "rollouts was 1, now 2"),
    ]:
        with pytest.raises(UserError, match=message):
            augment(dataclasses.replace(options, **change))


def test_another_model_or_input_under_an_old_name_is_refused(
    finished: tuple[AugmentOptions, list[Record]], documents: Path, model: str
) -> None:
    options, _ = finished
    weights = Path(model, "model.safetensors")
    for path, settings_name, name in [
        (documents, "input", str(documents)),
        (weights, "model_files", weights.name),
    ]:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        try:
            with pytest.raises(UserError, match=rf"{settings_name}: 1 changed \({re.escape(name)}\)"):
                augment(options)
        finally:
            path.write_bytes(content)
    assert augment(options).records == 0


def test_the_folder_is_a_data_set(finished: tuple[AugmentOptions, list[Record]]) -> None:
    import datasets
    import pandas

    options, done = finished
    loaded = datasets.load_dataset(str(options.output), split="train", cache_dir=str(options.output.parent / "cache"))
    assert loaded["id"] == [record.id for record in done]
    assert loaded["meta"] == [record.meta for record in done]
    frame = pandas.read_json(options.output / "part-00000-00000.jsonl.zst", lines=True)
    assert list(frame["thinking"]) == [record.thinking for record in done[:5]]


def test_bad_and_repeated_rows_are_rejects_and_every_row_is_accounted_for(
    documents: Path, model: str, tmp_path: Path
) -> None:
    lines = documents.read_text().splitlines(keepends=True)[:6]
    bad = tmp_path / "bad.jsonl"
    rows = [lines[0], "no JSON\n", "\n", *lines[1:4], '{"text": " "}\n', lines[2], lines[4], '{"text": "a\\ud800"}\n']
    bad.write_text("".join(rows) + lines[5])
    options = options_for(bad, model, tmp_path / "out")
    progress = augment(options)
    assert [record.text for record in records(options.output)] == [json.loads(line)["text"] for line in lines]
    reasons = [(reject["row"], reject["reason"]) for reject in rejects(options.output)]
    surrogate = "column 'text' holds half a surrogate pair"
    assert reasons == [(1, "not JSON"), (6, "empty text"), (7, "duplicate_id"), (9, surrogate)]
    assert progress.rejects == Counter(reason for _, reason in reasons)
    assert progress.records + progress.rejects.total() == len(rows)  # but for the blank line

    stopping = dataclasses.replace(options, on_bad_record="stop", output=tmp_path / "stopped")
    with pytest.raises(UserError, match=r"bad\.jsonl:2: not JSON"):
        augment(stopping)


def test_a_repeated_id_is_known_after_the_shard_that_had_it_is_done(model: str, tmp_path: Path) -> None:
    texts = ["one", "two", "three", "two"]
    path = write_documents(tmp_path / "documents.jsonl", ({"text": f"number {text}"} for text in texts))
    options = options_for(path, model, tmp_path / "out", rows_per_shard=2)
    augment(options)
    whole = shards(options.output)
    (options.output / "part-00000-00001.jsonl.zst").unlink()
    (options.output / "rejects" / "part-00000-00001.jsonl.zst").unlink()
    augment(options)
    assert shards(options.output) == whole
    assert [reject["reason"] for reject in rejects(options.output)] == ["duplicate_id"]


def test_the_limit_counts_rows_over_all_sources(documents: Path, model: str, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in documents.read_text().splitlines()]
    for name, part in [("a", rows[:7]), ("b", rows[7:9]), ("c", rows[9:])]:
        write_documents(tmp_path / "in" / f"{name}.jsonl", part)
    options = options_for(tmp_path / "in", model, tmp_path / "out", limit=11)
    assert augment(options).records == 11
    assert [record.text for record in records(options.output)] == [row["text"] for row in rows[:11]]
    (options.output / "part-00000-00001.jsonl.zst").unlink()
    assert augment(options).records == 2


def test_a_killed_job_retries_only_what_was_not_finished(documents: Path, model: str, tmp_path: Path) -> None:
    options = options_for(documents, model, tmp_path / "out", rows_per_shard=1000, max_num_seqs=1, max_new_tokens=130)
    journal = options.output / ".work" / "journal" / "part-00000-00000.jsonl"
    process = subprocess.Popen(command(options, "--max-num-seqs", "1"), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not shards(options.output)
    kept = journal.read_bytes().count(b"\n")
    assert 3 <= kept < NUM_DOCUMENTS
    with journal.open("ab") as file:
        file.write(b'{"row": 22, "id": "torn by the cra')
    (options.output / ".tmp-there-1-part-00000-00000.jsonl.zst").write_bytes(b"killed while it wrote the shard")
    assert augment(options).records == NUM_DOCUMENTS - kept
    whole = options_for(documents, model, tmp_path / "whole", rows_per_shard=1000, max_new_tokens=130)
    augment(whole)
    assert shards(options.output) == shards(whole.output)  # as if nothing had happened
    assert not list(options.output.glob(".tmp-*"))


def test_several_rollouts_are_records_of_their_own(documents: Path, model: str, tmp_path: Path) -> None:
    options = options_for(documents, model, tmp_path / "out", rollouts=3, limit=4)
    assert augment(options).records == 12
    done = records(options.output)
    first = content_id(done[0].text)
    assert [record.id for record in done[:3]] == [f"{first}#{i}" for i in range(3)]
    assert [record.meta["rollout"] for record in done[:3]] == [0, 1, 2]
    assert {record.meta["document_id"] for record in done[:3]} == {first}
    assert len({record.thinking for record in done}) == 12


@pytest.mark.slow
def test_answers_of_a_row_in_the_middle_of_its_rollouts_are_kept(documents: Path, model: str, tmp_path: Path) -> None:
    options = options_for(documents, model, tmp_path / "out", rollouts=40, limit=1, max_num_seqs=1, max_new_tokens=60)
    journal = options.output / ".work" / "journal" / "part-00000-00000.jsonl"
    process = subprocess.Popen(
        command(options, "--max-num-seqs", "1", "--rollouts", "40", "--limit", "1"), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    kept = [json.loads(line)["answer"] for line in journal.read_bytes().splitlines(keepends=True) if line[-1:] == b"\n"]
    progress = augment(options)
    assert progress.records + progress.rejects["too_short"] == 40  # an empty thought is none
    done = records(options.output)
    whole = options_for(documents, model, tmp_path / "whole", rollouts=40, limit=1, max_new_tokens=60)
    all_tokens = augment(whole).thinking_tokens
    assert progress.thinking_tokens + sum(answer["num_tokens"] for answer in kept) == all_tokens
    assert done == records(whole.output)


def test_chunks_of_a_long_document_have_a_thinking_each(documents: Path, model: str, tmp_path: Path) -> None:
    options = options_for(documents, model, tmp_path / "out", long_documents="chunk", max_document_tokens=30)
    augment(options)
    for record in records(options.output):
        chunks = record.meta["chunks"]
        assert chunks[-1]["text_end"] == len(record.text)
        assert chunks[-1]["thinking_end"] == len(record.thinking or "")
        begins = [0, *(chunk["thinking_end"] for chunk in chunks)]
        thoughts = [(record.thinking or "")[a:b].strip() for a, b in itertools.pairwise(begins)]
        assert len(set(thoughts)) == len(chunks) >= record.meta["document_tokens"] / 30
    assert max(len(record.meta["chunks"]) for record in records(options.output)) > 2


def test_the_record_can_keep_what_the_model_has_seen(documents: Path, model: str, tmp_path: Path) -> None:
    options = options_for(documents, model, tmp_path / "out", text="truncated")
    augment(options)
    tokenizer = load_tokenizer(model)
    for record, whole in zip(records(options.output), read_records([documents]), strict=True):
        assert whole.text.startswith(record.text)
        assert len(tokenizer(record.text).input_ids) == min(50, record.meta["document_tokens"])
        assert record.id == whole.id


def test_cut_thoughts_are_kept_dropped_or_shortened(documents: Path, model: str, tmp_path: Path) -> None:
    runs = {}
    for policy in ("keep", "drop", "sentence"):
        options = options_for(documents, model, tmp_path / policy, truncated=policy)
        augment(options)
        runs[policy] = {record.id: record for record in records(options.output)}
        lost = rejects(options.output)
        assert len(runs[policy]) + len(lost) == NUM_DOCUMENTS
    cut = {key for key, record in runs["keep"].items() if record.meta["truncated"]}
    assert 0 < len(cut) < NUM_DOCUMENTS
    assert set(runs["drop"]) == set(runs["keep"]) - cut
    for key, record in runs["sentence"].items():
        whole = runs["keep"][key]
        assert record.meta["truncated"] == (key in cut)
        assert (whole.thinking or "").startswith(record.thinking or "")
        assert record.meta["thinking_tokens"] <= whole.meta["thinking_tokens"]


def test_filtered_thoughts_are_rejects_with_a_reason(documents: Path, model: str, tmp_path: Path) -> None:
    filters = dataclasses.replace(NO_FILTERS, min_words=12)
    options = options_for(documents, model, tmp_path / "out", filters=filters)
    progress = augment(options)
    lost = rejects(options.output)
    assert {reject["reason"] for reject in lost} == {"too_short"}
    assert progress.rejects["too_short"] == len(lost) == NUM_DOCUMENTS - progress.records
    assert all(reject["thinking"] is not None and reject["id"] for reject in lost)


def test_back_thinking_reads_question_and_answer(model: str, tmp_path: Path) -> None:
    rows = [{"question": f"What is {i} + 1?", "answer": str(i + 1), "level": i % 2} for i in range(3)]
    path = write_documents(tmp_path / "problems.jsonl", rows)
    options = options_for(
        path,
        model,
        tmp_path / "out",
        prompt="back-thinking",
        text_column="question,answer",
        meta_columns=["level", "answer"],
    )
    augment(options)
    for row, record in zip(rows, records(options.output), strict=True):
        assert record.text == f"{row['question']}\n{row['answer']}"
        assert (record.meta["prompt"], record.meta["level"], record.meta["answer"]) == (
            "back-thinking",
            row["level"],
            row["answer"],
        )
        assert "question" not in record.meta


def test_other_prompts_and_models_that_do_not_think(documents: Path, tmp_path: Path) -> None:
    model = tmp_path / "talker"
    make_model(model, chat_template=CHAT_TEMPLATE)
    make_tokenizer(model, chat_template=CHAT_TEMPLATE, thinks=False)
    for prompt in ("random-focus", "rephrase"):
        options = options_for(documents, str(model), tmp_path / prompt, prompt=prompt, limit=5, max_document_tokens=20)
        assert augment(options).records == 5
        for record in records(options.output):
            assert record.meta["prompt"] == prompt
            assert FOCUS_MARK.strip() not in record.text
            assert record.thinking


@pytest.mark.slow
def test_tasks_together_do_what_one_does(documents: Path, model: str, tmp_path: Path) -> None:
    one = options_for(documents, model, tmp_path / "one", engine="transformers")
    augment(one)
    options = options_for(documents, model, tmp_path / "out")
    engine = ("--engine", "transformers")
    result = run_tool(options, *engine, "--num-tasks", "2", "--num-workers", "2")
    assert result.returncode == 0, result.stderr
    assert shards(options.output) == shards(one.output)
    assert (options.output / "README.md").exists()
    again = run_tool(options, *engine, "--num-tasks", "2")
    assert again.returncode == 0, again.stderr
    assert shards(options.output) == shards(one.output)


def test_a_recipe_holds_the_options_and_the_command_line_wins(
    finished: tuple[AugmentOptions, list[Record]], tmp_path: Path
) -> None:
    options, _ = finished
    recipe = tmp_path / "augment.yaml"
    recipe.write_text(
        f"input: [{options.input[0]}]\nmodel: {options.model}\noutput: {tmp_path / 'no'}\ntemperature: 1.0\n"
        "max_new_tokens: 40\nmax_document_tokens: 50\nrows_per_shard: 5\nwait: false\n"
        "filters: {min_words: 0, max_repeated_share: 1, loop_words: 0, max_foreign_share: 1, max_refusal_words: 0,\n"
        "  max_copied_share: 1}\n"
    )
    again = [sys.executable, str(TOOL), "--recipe", str(recipe), "--output", str(options.output)]
    result = subprocess.run(again, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "nothing to do" in result.stderr
    recipe.write_text(recipe.read_text() + "temprature: 1\n")
    result = subprocess.run(again, capture_output=True, text=True)
    assert result.returncode == 2
    assert "temprature" in result.stderr


def test_the_estimate_of_all_documents_is_the_truth(
    finished: tuple[AugmentOptions, list[Record]], documents: Path, model: str, tmp_path: Path
) -> None:
    _, done = finished
    guess = estimate(options_for(documents, model, tmp_path / "out", estimate=1000))
    assert (guess.documents, guess.is_counted, guess.num_records) == (NUM_DOCUMENTS, True, NUM_DOCUMENTS)
    ended = sum(not record.meta["truncated"] for record in done)
    assert (
        guess.documents * guess.thinking_tokens.mean == sum(record.meta["thinking_tokens"] for record in done) + ended
    )
    assert guess.document_tokens.total == sum(record.meta["document_tokens"] for record in done)
    assert f"{NUM_DOCUMENTS} documents" in guess.summary()
    assert not (tmp_path / "out").exists()


def test_mistakes_end_with_one_line_and_code_2_and_leave_nothing(documents: Path, model: str, tmp_path: Path) -> None:
    without_eos, empty, template = tmp_path / "no-eos", tmp_path / "empty.jsonl", tmp_path / "template.txt"
    make_model(without_eos)
    make_tokenizer(without_eos, eos=False)
    empty.write_text("\n")
    template.write_text("Think hard.")
    good = options_for(documents, model, tmp_path / "out")
    cases = {
        "no such file": command(dataclasses.replace(good, input=[str(tmp_path / "missing.jsonl")])),
        "no records": command(dataclasses.replace(good, input=[str(empty)])),
        "no such model folder": command(dataclasses.replace(good, model=str(tmp_path / "nowhere"))),
        "names no EOS token": command(dataclasses.replace(good, model=str(without_eos))),
        "the template has no placeholder": command(good, "--prompt", str(template)),
        "column 'body'": command(good, "--text-column", "body"),
        "context is 512 tokens": command(dataclasses.replace(good, max_new_tokens=500)),
        "must be from 0 to 2": command(good, "--temperature", "-1"),
        "--limit 0": command(good, "--limit", "0"),
        "--limit counts": command(good, "--limit", "1", "--num-tasks", "2"),
        "need each other": command(good, "--engine", "endpoint"),
        "cannot be read": command(good, "--recipe", str(tmp_path / "no.yaml")),
    }
    for message, arguments in cases.items():
        with pytest.raises(UserError, match=re.escape(message)):
            augment(parse(AugmentOptions, arguments[2:]))
        assert not good.output.exists()
    for message in ("no such model folder", "--limit 0"):
        result = subprocess.run(cases[message], capture_output=True, text=True)
        assert result.returncode == 2, (message, result.stderr)
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert not good.output.exists()


def test_the_help_answers_at_once() -> None:
    start = time.monotonic()
    result = subprocess.run([sys.executable, str(TOOL), "--help"], capture_output=True, text=True)
    elapsed_s = time.monotonic() - start
    assert result.returncode == 0
    assert "--max-document-tokens" in result.stdout
    probe = (
        "import sys; sys.argv = ['augment.py', '--help']\n"
        f"try: exec(open({str(TOOL)!r}).read())\n"
        "except SystemExit: assert not {'torch', 'vllm', 'transformers'} & set(sys.modules), 'heavy import'\n"
    )
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode == 0
    assert elapsed_s < 5  # well under 1 s on a machine with nothing else to do
