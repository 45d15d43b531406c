"""tools/augment.py from documents to shards, on the real vLLM engine with a tiny model."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import make_model, make_tokenizer, unchanged_environment

from megatron_tpt.errors import UserError
from megatron_tpt.generation import load_tokenizer
from megatron_tpt.records import Record, content_id, read_records
from megatron_tpt.thinking.augment import augment
from megatron_tpt.thinking.options import AugmentOptions

TOOL = Path(__file__).parents[2] / "tools" / "augment.py"


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    with unchanged_environment():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("documents") / "documents.jsonl"
    rows = [{"text": f"Document {i}: {'one more ' * i}\n", "title": f"no. {i}"} for i in range(23)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options_for(documents: Path, model: str, output: Path) -> AugmentOptions:
    return AugmentOptions(
        input=[documents],
        output=output,
        model=model,
        temperature=1.0,
        max_new_tokens=40,
        max_document_tokens=50,
        records_per_shard=5,
    )


@pytest.fixture(scope="module")
def finished(
    documents: Path, model: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[AugmentOptions, list[Record]]:
    options = options_for(documents, model, tmp_path_factory.mktemp("finished") / "out")
    counts = augment(options)
    assert (counts.records, counts.shards, counts.shards_skipped) == (23, 5, 0)
    return options, list(read_records([options.output]))


def shards(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.glob("part-*"))}


def test_every_document_becomes_one_record_in_its_place(finished: tuple[AugmentOptions, list[Record]]) -> None:
    options, records = finished
    assert sorted(shards(options.output)) == [f"part-{i:05d}.jsonl.zst" for i in range(5)]
    assert sorted(path.name for path in options.output.iterdir())[0] == "augment.json"
    texts = [record.text for record in read_records(options.input)]
    assert [record.text for record in records] == texts
    assert [record.id for record in records] == [content_id(text) for text in texts]


def test_records_say_how_their_thinking_came_about(
    finished: tuple[AugmentOptions, list[Record]], documents: Path, model: str
) -> None:
    _, records = finished
    tokenizer = load_tokenizer(model)
    for record in records:
        meta = record.meta
        assert meta["source"] == str(documents)
        assert meta["generator"] == model
        assert meta["prompt"] == "expert"
        assert meta["sampling"] == {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 40, "seed": 0}
        assert meta["document_tokens"] == len(tokenizer(record.text).input_ids)
        assert meta["truncated"] == (meta["finish_reason"] == "length")
        assert meta["thinking_tokens"] == 40 if meta["truncated"] else meta["thinking_tokens"] < 40
        assert "</think>" not in (record.thinking or "")
    assert len({record.thinking for record in records}) > 20
    assert max(record.meta["document_tokens"] for record in records) > 50  # the text is whole, the prompt was not


def test_again_it_writes_only_what_is_missing(
    finished: tuple[AugmentOptions, list[Record]], capsys: pytest.CaptureFixture[str]
) -> None:
    options, _ = finished
    before = shards(options.output)
    untouched = {name: (options.output / name).stat().st_mtime_ns for name in before}
    (options.output / "part-00002.jsonl.zst").unlink()
    (options.output / "part-00004.jsonl.zst").unlink()
    counts = augment(options)
    assert (counts.records, counts.shards, counts.shards_skipped) == (8, 2, 3)
    assert shards(options.output) == before
    for name in ("part-00000.jsonl.zst", "part-00001.jsonl.zst", "part-00003.jsonl.zst"):
        assert (options.output / name).stat().st_mtime_ns == untouched[name]

    start = time.monotonic()
    assert augment(options).records == 0
    assert time.monotonic() - start < 1  # without starting the engine
    assert "nothing to do" in capsys.readouterr().err


def test_other_settings_are_refused(finished: tuple[AugmentOptions, list[Record]]) -> None:
    options, _ = finished
    for change, message in [
        ({"temperature": 0.5}, "temperature was 1.0, now 0.5"),
        ({"limit": 3}, "limit was null, now 3"),
        ({"seed": 1, "top_p": 1.0}, "top_p was 0.9, now 1.0; seed was 0, now 1"),
    ]:
        with pytest.raises(UserError, match=message):
            augment(dataclasses.replace(options, **change))


def test_another_model_or_input_under_an_old_name_is_refused(
    finished: tuple[AugmentOptions, list[Record]], documents: Path, model: str
) -> None:
    options, _ = finished
    for path, settings_name in [(documents, "input"), (Path(model, "model.safetensors"), "model_files")]:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        try:
            with pytest.raises(UserError, match=f"{settings_name} was"):
                augment(options)
        finally:
            path.write_bytes(content)
    assert augment(options).records == 0


def test_bad_records_are_left_out_and_do_not_move_the_others(
    documents: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = documents.read_text().splitlines(keepends=True)[:6]
    bad = tmp_path / "bad.jsonl"
    bad.write_text(lines[0] + "no JSON\n" + "".join(lines[1:4]) + '{"text": " "}\n' + "".join(lines[4:]))
    options = dataclasses.replace(options_for(bad, model, tmp_path / "out"), on_bad_record="skip", limit=5)
    assert augment(options).records == 5
    texts = [record.text for record in read_records([tmp_path / "out"])]
    assert texts == [json.loads(line)["text"] for line in lines[:5]]
    assert "skipped 1 bad records: not JSON" in capsys.readouterr().err

    stopping = dataclasses.replace(options, on_bad_record="stop", output=tmp_path / "stopped", records_per_shard=1)
    with pytest.raises(UserError, match=r"bad\.jsonl:2: not JSON"):
        augment(stopping)
    assert not [path for path in (tmp_path / "stopped").iterdir() if path.name.startswith(".")]


def command(options: AugmentOptions, *more: str) -> list[str]:
    return [
        sys.executable,
        str(TOOL),
        *("--input", *map(str, options.input), "--output", str(options.output), "--model", options.model),
        *("--temperature", str(options.temperature), "--max-new-tokens", str(options.max_new_tokens)),
        *("--max-document-tokens", str(options.max_document_tokens)),
        *("--records-per-shard", str(options.records_per_shard), *more),
    ]


def test_a_killed_run_is_finished_by_the_same_command(documents: Path, model: str, tmp_path: Path) -> None:
    options = dataclasses.replace(
        options_for(documents, model, tmp_path / "out"), records_per_shard=1, max_num_seqs=1, max_new_tokens=130
    )
    process = subprocess.Popen(command(options, "--max-num-seqs", "1"), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while len(shards(options.output)) < 2:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    survivors = shards(options.output)
    assert 2 <= len(survivors) < 23
    assert augment(options).shards == 23 - len(survivors)
    assert shards(options.output).items() >= survivors.items()
    texts = [record.text for record in read_records([options.output])]
    assert texts == [record.text for record in read_records([documents])]


def test_mistakes_end_with_one_line_and_code_2_and_leave_nothing(documents: Path, model: str, tmp_path: Path) -> None:
    without_eos, empty, template = tmp_path / "no-eos", tmp_path / "empty.jsonl", tmp_path / "template.txt"
    make_model(without_eos)
    make_tokenizer(without_eos, eos=False)
    empty.write_text("")
    template.write_text("Think hard.")
    good = options_for(documents, model, tmp_path / "out")
    cases = {
        "no such file": command(dataclasses.replace(good, input=[tmp_path / "missing.jsonl"])),
        "no records": command(dataclasses.replace(good, input=[empty])),
        "no such model folder": command(dataclasses.replace(good, model=str(tmp_path / "nowhere"))),
        "names no EOS token": command(dataclasses.replace(good, model=str(without_eos))),
        "the template must have {document} exactly once": command(good, "--prompt", str(template)),
        "column 'body'": command(good, "--text-column", "body"),
        "context is 512 tokens": command(dataclasses.replace(good, max_new_tokens=500)),
        "must be from 0 to 2": command(good, "--temperature", "-1"),
        "--limit 0": command(good, "--limit", "0"),
    }
    for message, arguments in cases.items():
        result = subprocess.run(arguments, capture_output=True, text=True)
        assert result.returncode == 2, (message, result.stderr)
        assert message in result.stderr
        assert "Traceback" not in result.stderr
        assert len(result.stderr.splitlines()) == 1 or "parsing" in result.stderr, result.stderr
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
