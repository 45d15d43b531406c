"""Bad input and bad servers at once: the job ends, and every row of the input is a record or a reject with a reason."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
from augment_runs import options_for, records, rejects
from unruly_server import KEY, MODEL, unruly_server

from megatron_tpt.thinking.augment import augment

NUM_GOOD = 300
# The first word of a document sets how the server misbehaves, the second how often.
PASSING_FAULTS = [f"{fault} 1" for fault in ("500", "503", "429", "hang", "cut", "garbage", "nochoices", "notext")]
LASTING_FAULTS = {"400 99": "engine_bad_request", "hang 99": "engine_timeout", "garbage 99": "engine_invalid_response"}


def poisoned_lines() -> tuple[list[bytes], Counter[str]]:
    """Lines of input, and how often each reason must be among the rejects."""
    good = [
        {"id": i, "text": f"{PASSING_FAULTS[i] if i < len(PASSING_FAULTS) else 'ok 0'} {i}"} for i in range(NUM_GOOD)
    ]
    good += [
        {"id": "controls", "text": "ok 0 \x00\x01\x1b[31m\x7f\u2028\ufeff"},
        {"id": "one word of 1 MB", "text": "ok 0 " + "x" * 1_000_000},
        {"id": "a word alone", "text": "ok 0 " + "\U0001f600" * 1000},
    ]
    lines = [json.dumps(row).encode() for row in good]
    bad = {
        "not JSON": [b'{"text": "cut', b"\x00\x00\x00"],
        "nested too deeply": [b"[" * 100_000],
        "not UTF-8": [b'{"text": "\xff\xfe"}'],
        "not a JSON object": [b"17"],
        "empty text": [b'{"text": ""}', b'{"text": " \\u00a0\\n"}'],
        "column 'text' holds half a surrogate pair": [b'{"text": "a \\ud800 b"}'],
        "column 'text' is not a string": [b'{"text": 3}'],
        "no text": [b"{}", b'{"text": null}'],
        "duplicate_id": [lines[20], lines[200], lines[200]],
    }
    for i, reason_lines in enumerate(bad.values()):
        for j, line in enumerate(reason_lines):
            lines.insert(60 + 17 * i + j, line)
    reasons = Counter({reason: len(reason_lines) for reason, reason_lines in bad.items()})
    # The lines of duplicates come after the ones they repeat.
    lines += [lines.pop(lines.index(line)) for line in dict.fromkeys(bad["duplicate_id"])]
    for fault, reason in LASTING_FAULTS.items():
        lines.append(json.dumps({"id": fault, "text": f"{fault} x"}).encode())
        reasons[reason] += 1
    return lines, reasons


def test_every_row_is_accounted_for_whatever_input_and_servers_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lines, reasons = poisoned_lines()
    (tmp_path / "in.jsonl").write_bytes(b"\n".join([*lines, b"", b"   "]))
    template = tmp_path / "bare.txt"
    template.write_text("{document}")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with unruly_server(key=KEY) as server, unruly_server(key=KEY) as other:
        options = options_for(
            tmp_path / "in.jsonl",
            MODEL,
            tmp_path / "out",
            engine="endpoint",
            api="chat",
            endpoints=[server.url, other.url],
            prompt=str(template),
            max_document_tokens=2048,
            request_timeout_s=1.0,
            rows_per_shard=100,
        )
        progress = augment(options)
        asked = len(server.bodies) + len(other.bodies)
        assert augment(dataclasses.replace(options)).records == 0
        assert len(server.bodies) + len(other.bodies) == asked
    done, lost = records(options.output), rejects(options.output)
    assert Counter(reject["reason"] for reject in lost) == reasons == progress.rejects
    assert len(done) + len(lost) == len(lines)
    assert len({record.id for record in done}) == len(done) == progress.records
    files = b"".join(path.read_bytes() for path in options.output.rglob("*") if path.is_file())
    assert KEY not in "".join(capfd.readouterr())
    assert KEY.encode() not in files


def test_a_row_that_is_answered_before_the_next_is_read_counts_once(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": f"ok 0 {i}"}) + "\n" for i in range(25)))
    (tmp_path / "bare.txt").write_text("{document}")
    with unruly_server() as server:
        options = options_for(
            tmp_path / "in.jsonl",
            MODEL,
            tmp_path / "out",
            engine="endpoint",
            api="chat",
            endpoints=[server.url],
            prompt=str(tmp_path / "bare.txt"),
            max_num_seqs=1,
            rows_per_shard=10,
        )
        assert augment(options).records == 25
    assert [record.text for record in records(options.output)] == [f"ok 0 {i}" for i in range(25)]
