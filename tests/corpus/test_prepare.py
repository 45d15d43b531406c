"""tools/prepare.py from raw files to clean ones: what is dropped, what is kept, and that nothing is lost."""

import dataclasses
import gzip
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from corpus_files import kept_texts, output_bytes, rejects, sentence, write_jsonl

from megatron_tpt.corpus import prepare as prepare_module
from megatron_tpt.corpus.options import PrepareOptions
from megatron_tpt.corpus.prepare import prepare
from megatron_tpt.corpus.report import Report
from megatron_tpt.errors import UserError
from megatron_tpt.records import Record, content_id, read_records, write_records

TOOL = Path(__file__).parents[2] / "tools" / "prepare.py"
QUESTION = "Ann buys three apples for 12 euros each and sells 2 of them to Ben for 15 euros; how much is left?"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Three sources in three formats: duplicates within and across them, near-duplicates, a planted evaluation item
    (twice), bad rows.
    """
    folder = tmp_path / "raw"
    texts = [sentence(seed, 60) for seed in range(40)]
    near = texts[5].replace(".", " and so on.")
    planted = f"{sentence(100)}\n“{QUESTION.upper()}” {sentence(101)}"
    first = [{"id": f"a{i}", "text": text, "title": i} for i, text in enumerate([*texts[:20], texts[3], planted])]
    first[1:1] = ["{broken", {"id": "blank", "text": " "}, "", '["no object"]']
    write_jsonl(folder / "1.jsonl", first)
    write_records(folder / "2.parquet", [Record(f"b{i}", text) for i, text in enumerate([*texts[15:30], near])])
    last = [{"text": text} for text in [*texts[28:], texts[3], texts[39], texts[7].upper(), planted, 5]]
    with gzip.open(folder / "3.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in last)
    write_jsonl(tmp_path / "questions.jsonl", [{"question": sentence(200)}, {"question": QUESTION}])
    return folder


def options_for(raw: Path, **changes: Any) -> PrepareOptions:
    evaluation = f"exam={raw.parent / 'questions.jsonl'}:question"
    return dataclasses.replace(
        PrepareOptions(
            [str(raw)],
            raw.parent / "clean",
            meta_columns=["title"],
            deduplicate="minhash",
            decontaminate=[evaluation],
            rows_per_shard=7,
            num_workers=1,
        ),
        **changes,
    )


def test_counts_add_up_and_every_row_is_accounted_for(raw: Path) -> None:
    options = options_for(raw)
    report = prepare(options)
    assert report.num_rows == 25 + 16 + 17
    assert report.dropped == {
        "bad record: column 'text' is not a string": 1,
        "bad record: empty text": 1,
        "bad record: not JSON": 1,
        "bad record: not a JSON object": 1,
        "contaminated": 2,
        "duplicate": 1 + 5 + 2 + 2,
        "near_duplicate": 2,
    }
    assert report.num_kept + sum(report.dropped.values()) == report.num_rows
    lines = rejects(options.output)
    assert Counter(line["reason"] for line in lines) == report.dropped
    assert kept_texts(options.output) == [sentence(seed, 60) for seed in range(40)]
    assert report.evaluation_sets["exam"]["documents"] == 2
    assert report.num_parts == len(list(options.output.glob("part-*")))
    kept_for_growth = sorted(path.name for path in (options.output / ".work").iterdir())
    assert kept_for_growth == ["scan", "write"]


def test_rejects_say_why(raw: Path) -> None:
    options = options_for(raw)
    prepare(options)
    lines = rejects(options.output)
    one, two, three = (str(raw / name) for name in ("1.jsonl", "2.parquet", "3.jsonl.gz"))
    by_row = {(line["source"], line["row"]): line for line in lines}
    assert by_row[one, 2]["reason"] == "bad record: not JSON" and by_row[one, 2]["evidence"]["detail"]
    duplicate = by_row[one, 25]
    assert (duplicate["id"], duplicate["reason"], duplicate["text"]) == ("a20", "duplicate", None)
    assert duplicate["evidence"] == {"kept": {"id": "a3", "source": one, "row": 8}}
    assert by_row[two, 5]["evidence"] == {"kept": {"id": "a19", "source": one, "row": 24}}
    assert by_row[three, 2]["evidence"] == {"kept": {"id": "b14", "source": two, "row": 15}}
    near = by_row[two, 16]
    assert (near["reason"], near["evidence"]["kept"]["id"]) == ("near_duplicate", "a5")
    assert near["text"] == sentence(5, 60).replace(".", " and so on.")
    planted = by_row[three, 16]
    assert planted["reason"] == "contaminated" and planted["id"] == content_id(planted["text"])
    assert planted["evidence"] == {
        "matches": {"exam": 10},
        "evaluation_set": "exam",
        "item": 2,
        "ngram": "ann buys three apples for 12 euros each and sells 2 of them",
    }


def test_kept_records_keep_what_they_had_and_name_their_source(raw: Path) -> None:
    options = options_for(raw)
    prepare(options)
    records = list(read_records(sorted(options.output.glob("part-*"))))
    assert records[0] == Record("a0", sentence(0, 60), None, {"source": str(raw / "1.jsonl"), "title": 0})
    thinking = Record("t", "text with thinking", "a thought", {"source": "elsewhere", "generator": "m"})
    write_records(raw.parent / "t.jsonl", [thinking])
    prepare(options_for(raw, input=[str(raw.parent / "t.jsonl")], output=raw.parent / "t", decontaminate=[]))
    assert list(read_records([raw.parent / "t"])) == [thinking]


def test_the_report_shows_counts_sets_and_examples(raw: Path) -> None:
    options = options_for(raw)
    prepare(options)
    text = (options.output / "report.md").read_text()
    for line in (
        "# Corpus: 58 rows of 3 sources",
        "| kept | 40 | 68.97% |",
        "| contaminated | 2 | 3.45% |",
        "| all | 58 | 100% |",
        "| exam | 2 | 2 | 0 | 0 | 0 | 2 | 1 |",
        "- exam: 1 of 2 items overlap the corpus as it was: 2",
        "### contaminated: exam",
        "### near_duplicate",
    ):
        assert line in text.splitlines()
    assert "ngram: ann buys three apples for 12 euros each and sells 2 of them" in text


@pytest.mark.parametrize(
    ("changes", "num_kept"),
    [
        ({"deduplicate": "none", "decontaminate": []}, 54),
        ({"deduplicate": "none"}, 52),
        ({"deduplicate": "exact", "decontaminate": []}, 43),
        ({"deduplicate": "exact"}, 42),
        ({"deduplicate": "exact", "ignore_case": True}, 41),
        ({"ngram": 30, "min_matches": 2}, 40),
    ],
)
def test_options_decide_what_is_dropped(raw: Path, changes: dict[str, Any], num_kept: int) -> None:
    report = prepare(options_for(raw, **changes))
    assert report.num_kept == num_kept == report.num_rows - sum(report.dropped.values())


def test_the_output_is_the_same_for_any_number_of_workers(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "_BYTES_PER_STRIPE", 100)
    outputs = {}
    for num_workers in (1, 2):
        options = options_for(raw, output=raw.parent / f"clean{num_workers}", num_workers=num_workers)
        prepare(options)
        outputs[num_workers] = output_bytes(options.output)
    assert outputs[1] == outputs[2] and len(outputs[1]) > 10


def killed_after(options: PrepareOptions, delay_s: float) -> bool:
    """Run in a process of its own and kill it, unless it ends before. Returns whether it was killed."""
    process = multiprocessing.get_context("fork").Process(target=prepare, args=(options,))
    process.start()
    process.join(delay_s)
    was_killed = process.exitcode is None
    process.kill()
    process.join()
    return was_killed


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_killed_run_goes_on_to_the_same_bytes(raw: Path) -> None:
    expected_options = options_for(raw, output=raw.parent / "expected", rows_per_shard=2)
    prepare(dataclasses.replace(expected_options, output=raw.parent / "first"))  # imports
    start_s = time.monotonic()
    prepare(expected_options)
    duration_s = time.monotonic() - start_s
    expected = output_bytes(expected_options.output)
    draw = random.Random(0)
    states = set()
    for trial in range(4):
        options = dataclasses.replace(expected_options, output=raw.parent / f"clean{trial}")
        num_kills = 0
        while killed_after(options, draw.uniform(0.05, 0.5) * duration_s) and num_kills < 8:
            num_kills += 1
            states.add(frozenset(path.name for path in (options.output / ".work").glob("*")))
        prepare(options)
        assert output_bytes(options.output) == expected
    assert len(states) > 2, "the kills came at the same moment"


def test_the_tool_goes_on_after_kill_with_several_workers(raw: Path) -> None:
    expected_options = options_for(raw, output=raw.parent / "expected", deduplicate="exact")
    prepare(expected_options)
    options = options_for(raw)
    command = [sys.executable, str(TOOL), "--input", str(raw), "--output", str(options.output), "--num-workers", "2"]
    command += ["--meta-columns", "title", "--rows-per-shard", "7"]
    command += ["--decontaminate", *options.decontaminate]
    process = subprocess.Popen(command)
    deadline_s = time.monotonic() + 120
    while not list(options.output.glob(".work/scan/*/*.json")):
        assert time.monotonic() < deadline_s and process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "42 documents kept" in again.stderr
    assert output_bytes(options.output) == output_bytes(expected_options.output)


def test_a_finished_run_does_nothing_again(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = options_for(raw)
    report = prepare(options)
    times = {path: path.stat().st_mtime_ns for path in options.output.rglob("part-*")}
    assert prepare(dataclasses.replace(options, num_workers=2)) == report
    assert "nothing to do" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in options.output.rglob("part-*")} == times


def test_other_settings_are_refused(raw: Path) -> None:
    options = options_for(raw)
    prepare(options)
    for changes, message in [
        ({"deduplicate": "exact"}, 'deduplicate was "minhash", now "exact"'),
        ({"ngram": 8}, "ngram was 13, now 8"),
        ({"input": [str(raw / "1.jsonl")]}, r"input: 2 removed \(.*2\.parquet, .*3\.jsonl\.gz\)"),
        ({"decontaminate": []}, r"decontaminate: 1 removed \(exam\)"),
    ]:
        with pytest.raises(UserError, match=message):
            prepare(dataclasses.replace(options, **changes))
    write_jsonl(raw.parent / "questions.jsonl", [{"question": "another"}])
    with pytest.raises(UserError, match=r"decontaminate: 1 changed \(exam: files: 1 changed \(.*questions\.jsonl\)\)"):
        prepare(options)
    (options.output / "prepare.json").unlink()
    with pytest.raises(UserError, match=r"has shards but no prepare\.json"):
        prepare(options)


def test_what_differs_in_the_input_is_named(raw: Path) -> None:
    options = options_for(raw)
    prepare(options)
    write_jsonl(raw / "1.jsonl", [{"text": sentence(900)}])
    (raw / "2.parquet").rename(raw / "renamed.parquet")
    for number in range(5):
        write_jsonl(raw / f"new{number}.jsonl", [{"text": sentence(901 + number)}])
    with pytest.raises(UserError, match="input: ") as raised:
        prepare(options)
    message = str(raised.value).replace(f"{raw}/", "")
    assert (
        "input: 5 added (new0.jsonl, new1.jsonl, new2.jsonl and 2 more), 1 renamed (2.parquet to renamed.parquet), "
        "1 changed (1.jsonl)" in message
    )


def test_another_order_of_the_input_is_named(raw: Path) -> None:
    files = [str(raw / name) for name in ("1.jsonl", "2.parquet", "3.jsonl.gz")]
    prepare(options_for(raw, input=files))
    with pytest.raises(UserError, match=r"the order was .*1\.jsonl, .*now .*3\.jsonl\.gz, .*2\.parquet"):
        prepare(options_for(raw, input=files[::-1]))


def grown(raw: Path, **changes: Any) -> tuple[PrepareOptions, PrepareOptions]:
    """A finished job to whose input files are added, one before and one after the others by name; and one that has
    them from its start, in that order."""
    options = options_for(raw, **changes)
    first = sorted(map(str, raw.iterdir()))
    prepare(options)
    new = [{"text": text} for text in (sentence(3, 60), sentence(500, 60), QUESTION, sentence(501, 60))]
    names = [str(write_jsonl(raw / "0.jsonl", new[:2])), str(write_jsonl(raw / "9.jsonl", new[1:]))]
    return options, dataclasses.replace(options, input=first + names, output=raw.parent / "from_the_start")


@pytest.mark.parametrize("deduplicate", ["none", "exact", "minhash"])
@pytest.mark.parametrize("has_work", [True, False])
def test_files_added_to_a_finished_job_give_what_all_files_give(
    raw: Path, deduplicate: str, has_work: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    options, from_the_start = grown(raw, deduplicate=deduplicate)
    before = {path.name: path.stat().st_mtime_ns for path in options.output.glob("part-*")}
    if not has_work:  # finished by an earlier version
        shutil.rmtree(options.output / ".work")
    capsys.readouterr()
    report = prepare(options)
    assert f"the input has grown, 2 added ({raw}/0.jsonl, {raw}/9.jsonl)" in capsys.readouterr().err
    assert report == prepare(from_the_start)
    found, expected = output_bytes(options.output), output_bytes(from_the_start.output)
    assert found.pop("prepare.json") != expected.pop("prepare.json")
    assert found == expected
    if has_work and deduplicate != "minhash":  # what is done is not done again
        assert before.items() <= {p.name: p.stat().st_mtime_ns for p in options.output.glob("part-*")}.items()
    capsys.readouterr()
    assert prepare(options) == report
    assert "nothing to do" in capsys.readouterr().err


def test_a_new_document_joins_near_duplicates_that_were_kept(raw: Path) -> None:
    words, others = sentence(0, 100).split(), sentence(1000, 100).split()
    middle = others[:12] + words[12:]
    end = middle[:-12] + others[-12:]  # near to `middle`, and not to `words`
    write_jsonl(raw / "1.jsonl", ({"text": " ".join(text)} for text in (words, end)))
    options = options_for(raw, input=[str(raw / "[19].jsonl")])
    assert prepare(options).num_kept == 2
    write_jsonl(raw / "9.jsonl", [{"text": " ".join(middle)}])
    assert prepare(options).dropped == {"near_duplicate": 2}
    assert kept_texts(options.output) == [" ".join(words)]


def test_a_job_grows_again_and_before_it_has_finished(raw: Path) -> None:
    options = options_for(raw)
    moved = (raw / "2.parquet").rename(raw.parent / "2.parquet")
    prepare(options)
    Report.path(options.output).unlink()  # as if killed at its end
    moved.rename(raw / "2.parquet")
    prepare(options)
    write_jsonl(raw / "0.jsonl", [{"text": sentence(500, 60)}])
    report = prepare(options)
    order = ["1.jsonl", "3.jsonl.gz", "2.parquet", "0.jsonl"]
    settings = json.loads((options.output / "prepare.json").read_text())
    assert [Path(entry["name"]).name for entry in settings["input"]] == order
    expected = options_for(raw, input=[str(raw / name) for name in order], output=raw.parent / "expected")
    assert report == prepare(expected)
    assert kept_texts(options.output) == kept_texts(expected.output)


def test_files_that_cannot_be_added_leave_the_job_as_it_was(raw: Path) -> None:
    options = options_for(raw, deduplicate="exact")
    report = prepare(options)
    before = output_bytes(options.output)
    for has_work in (True, False):
        odd = raw / "9.parquet"
        write_records(odd, [Record("x", sentence(1))])
        odd.write_bytes(odd.read_bytes().replace(b"text", b"body"))
        with pytest.raises(UserError, match=r"9\.parquet"):
            prepare(options)
        odd.unlink()
        assert prepare(options) == report
        assert output_bytes(options.output) == before
        if has_work:
            shutil.rmtree(options.output / ".work")
    write_jsonl(raw / "9.jsonl", [{"text": sentence(700)}])
    assert prepare(options).num_kept == report.num_kept + 1


@pytest.mark.parametrize("other", [True, False])
def test_a_killed_addition_is_resumed_unless_other_files_are_added(
    raw: Path, other: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_for(raw)
    prepare(options)
    new = write_jsonl(raw / "9.jsonl", [{"text": sentence(seed, 60)} for seed in range(700, 720)])

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_module, "_reopen", killed)
        prepare(options)
    scanned = options.output / ".work" / "scan" / "000003" / "000000.json"
    time_before = scanned.stat().st_mtime_ns
    if other:
        new.unlink()
        new = write_jsonl(raw / "8.jsonl", [{"text": sentence(800, 60)}])
    report = prepare(options)
    assert (scanned.stat().st_mtime_ns == time_before) == (not other)
    order = [*(str(raw / name) for name in ("1.jsonl", "2.parquet", "3.jsonl.gz")), str(new)]
    expected = options_for(raw, input=order, output=raw.parent / "expected")
    assert report == prepare(expected)
    assert kept_texts(options.output) == kept_texts(expected.output)


def test_sources_that_come_to_nothing_are_named(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (raw / "empty.jsonl").write_text("\n")
    write_jsonl(raw / "other.jsonl", [{"content": "x"}, {"content": "y"}, "{"])
    report = prepare(options_for(raw))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert said == [
        f"warning: {raw}/empty.jsonl: holds no rows",
        f"warning: {raw}/other.jsonl: none of its 3 rows is a document (no text: 2, not JSON: 1)",
    ]
    assert report.dropped["bad record: no text"] == 2


def test_what_has_no_effect_or_is_not_read_is_said(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"minhash_ngram": 3, "ignore_case": True, "ngram": 8, "decontaminate": [], "deduplicate": "none"}
    whole = (raw / "3.jsonl.gz").read_bytes()
    (raw / "3.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    prepare(options_for(raw, meta_columns=["title", "titel"], **changes))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert said[:3] == [
        "warning: --minhash-ngram has no effect without --deduplicate minhash",
        "warning: --ignore-case has no effect without --deduplicate exact or minhash",
        "warning: --ngram has no effect without --decontaminate",
    ]
    assert "3.jsonl.gz: damaged after " in said[3] and said[3].endswith("rows; what follows is not read")
    assert said[4:] == ["warning: --meta-columns titel: no document has such a column"]
    prepare(options_for(raw, output=raw.parent / "second", meta_columns=["title"], deduplicate="exact"))
    assert "no effect" not in capsys.readouterr().err


def test_columns_that_are_not_kept_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, table = tmp_path / "a.jsonl", tmp_path / "b.parquet"
    lines.write_text('{"id": "1", "text": "a document", "url": "u", "q": {"a": 1}}\n')
    columns = [pyarrow.array(["another one"])] + [pyarrow.array([1])] * 2
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, ["text", "score", "score"]), table)

    def notes(name: str, **changes: Any) -> list[str]:
        prepare(PrepareOptions([str(lines), str(table)], tmp_path / name, num_workers=1, **changes))
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]

    rest = f"(first seen in {lines}); --meta-columns keeps columns in meta"
    assert notes("one") == [f"note: not kept: q, score, url {rest}"]
    lines.write_text('{"id": "1", "text": "a document", "url": "u"}\n')
    table.unlink()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["another one"], "meta": ["{}"]}), table)
    assert notes("two", meta_columns=["url"]) == []


def test_where_no_row_is_a_document_the_advice_is_about_the_cause(tmp_path: Path) -> None:
    def advice(name: str, content: str | bytes, **changes: Any) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError, match="the input holds no document") as error:
            prepare(PrepareOptions([str(path)], tmp_path / f"clean-{name}", num_workers=1, **changes))
        return str(error.value).partition("; ")[2]

    sink = io.BytesIO()
    table = pyarrow.table({"text": ["a document"], "image": pyarrow.array([b"\xff"], pyarrow.binary())})
    pyarrow.parquet.write_table(table, sink)
    assert advice("image.parquet", sink.getvalue(), meta_columns=["image"]) == "omit image from --meta-columns"
    for name, content in [("empty.jsonl", "\n"), ("broken.jsonl", "x\ny\n"), ("cut.parquet", sink.getvalue()[:99])]:
        assert advice(name, content) == "fix these files or name others with --input"
    for name, content in [("other.jsonl", '{"body": "x"}'), ("list.jsonl", '{"text": ["x"]}')]:
        assert advice(name, content) == "is --text-column right?"


@pytest.mark.slow
def test_a_document_of_60_mb_takes_less_than_1_gb(tmp_path: Path) -> None:
    make = (
        "import json, random, sys\n"
        "texts = [' '.join('w%x' % random.getrandbits(20) for _ in range(9_000_000)), 'a short document']\n"
        "open(sys.argv[1], 'w').writelines(json.dumps({'text': text}) + '\\n' for text in texts)\n"
    )
    measure = (  # of a process of its own, whose parent is small
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    )
    path = tmp_path / "large.jsonl"
    subprocess.run([sys.executable, "-c", make, str(path)], check=True)
    assert path.stat().st_size > 60_000_000
    evaluation = write_jsonl(tmp_path / "questions.jsonl", [{"question": QUESTION}])
    command = [sys.executable, str(TOOL), "--input", str(path), "--output", str(tmp_path / "clean")]
    command += ["--deduplicate", "minhash", "--decontaminate", f"exam={evaluation}:question", "--num-workers", "1"]
    command += ["--ignore-case", "--ignore-whitespace"]
    run = subprocess.run([sys.executable, "-c", measure, *command], capture_output=True, text=True, check=True)
    assert int(run.stdout) * 1024 < 500_000_000


def test_an_output_that_would_be_read_as_input_is_refused(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (raw.parent / "link").symlink_to(raw)
    monkeypatch.chdir(raw)
    for changes in (
        {"output": raw / "clean"},
        {"output": Path("clean")},
        {"output": raw},
        {"output": raw.parent / "link" / "deep" / "clean"},
        {"input": [str(raw.parent / "link")], "output": raw / "clean"},
        {"input": [str(raw / "1.jsonl")], "output": raw},
    ):
        with pytest.raises(UserError, match=r"--output .*: (is inside the input|the input file .* is inside it)"):
            prepare(options_for(raw, **changes))
    assert sorted(path.name for path in raw.iterdir()) == ["1.jsonl", "2.parquet", "3.jsonl.gz"]


def test_a_job_of_which_no_document_is_left_has_not_finished(raw: Path) -> None:
    path = write_jsonl(raw / "all.jsonl", [{"text": f"{QUESTION} {sentence(i)}"} for i in range(3)])
    options = options_for(raw, input=[str(path)])
    for _ in range(2):  # the second run does not find it done either
        with pytest.raises(UserError, match=r"no document is left \(3 rows, .*contaminated: 3\)"):
            prepare(options)
    assert not Report.path(options.output).exists()
    assert [line["reason"] for line in rejects(options.output)] == ["contaminated"] * 3
    assert "| contaminated | 3 | 100.00% |" in (options.output / "report.md").read_text()


def test_a_mistake_leaves_the_output_free_for_another_try(raw: Path) -> None:
    for name, message in (("1.jsonl", r"no document.*no text: 23"), ("2.parquet", "content")):
        options = options_for(raw, input=[str(raw / name)], text_column="content", decontaminate=[])
        with pytest.raises(UserError, match=message):
            prepare(options)
        assert prepare(dataclasses.replace(options, text_column="text", output=options.output)).num_kept > 10
        for path in sorted(options.output.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


def test_a_duplicate_of_a_near_duplicate_names_the_document_that_is_kept(raw: Path) -> None:
    texts = [sentence(1, 60), sentence(1, 60) + " Read more.", sentence(1, 60) + " Read more."]
    path = write_jsonl(raw / "near.jsonl", [{"id": str(i), "text": text} for i, text in enumerate(texts)])
    options = options_for(raw, input=[str(path)], rows_per_shard=1)
    prepare(options)
    near, duplicate = rejects(options.output)
    assert (near["reason"], duplicate["reason"]) == ("near_duplicate", "duplicate")
    assert near["evidence"]["kept"]["id"] == duplicate["evidence"]["kept"]["id"] == "0"


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".parquet"])
def test_a_damaged_file_is_read_as_far_as_it_goes(raw: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "_BYTES_PER_STRIPE", 100)
    texts = [sentence(seed) for seed in range(5000)]
    path = raw / f"damaged{suffix}"
    write_records(path, [Record(str(i), text) for i, text in enumerate(texts)])
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(500) + content[middle + 500 :])
    results = []
    for num_workers in (1, 2):
        output = raw.parent / f"clean{num_workers}"
        changes = {"output": output, "decontaminate": [], "deduplicate": "exact", "num_workers": num_workers}
        report = prepare(options_for(raw, input=[str(path)], rows_per_shard=500, **changes))
        assert report.dropped["bad record: damaged file"] == 1
        assert kept_texts(output) == texts[: report.num_kept] and 500 < report.num_kept < 4500
        results.append(output_bytes(output))
    assert results[0] == results[1]


def test_the_tool_says_what_to_fix(raw: Path) -> None:
    for arguments, message in [
        (["--input", str(raw / "none.jsonl")], "none.jsonl"),
        (["--input", str(raw), "--decontaminate", "x"], "NAME=FILE"),
        (["--input", str(raw), "--ngram", "0"], "--ngram 0: must be 1 or more"),
    ]:
        command = [sys.executable, str(TOOL), "--output", str(raw.parent / "clean"), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 2 and message in result.stderr
        assert "Traceback" not in result.stderr
