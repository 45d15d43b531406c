"""tools/curate.py from data sets to strata: what is annotated, what belongs where, and that nothing is lost."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from corpus_files import output_bytes, rejects, sentence, write_jsonl
from tiny_models import make_tokenizer

from megatron_tpt.corpus import curate_options
from megatron_tpt.corpus.annotate.classifiers import load_classifier
from megatron_tpt.corpus.curate import curate
from megatron_tpt.corpus.curate_options import CurateOptions
from megatron_tpt.corpus.curate_report import ALL, CurateReport
from megatron_tpt.corpus.documents import Document
from megatron_tpt.errors import UserError
from megatron_tpt.records import Record, read_records

TOOL = Path(__file__).parents[2] / "tools" / "curate.py"
STRATA = """\
big: {where: "'big' in datasets"}
fine: {where: "'fine' in datasets", about: small and good}
union: {any_of: [big, fine]}
long: {of: big, where: answer_tokens > 90}
control: {of: big, size_of: fine}
two: {of: big, documents: 2}
"""


def solution(seed: int, num_words: int = 30) -> str:
    return f"Let x be so. Therefore \\frac{{{seed}}}{{2}} = {seed / 2}. {sentence(seed, num_words)}"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Two data sets that share documents, one of them a conversation; an evaluation item; bad rows; strata."""
    pairs = [{"id": f"b{i}", "q": sentence(1000 + i, 9), "a": solution(i, 20 + 4 * i)} for i in range(20)]
    pairs[3] = {"q": "why", "a": " "}
    write_jsonl(tmp_path / "big/1.jsonl", [*pairs, "{broken", {"q": "no answer"}])
    write_jsonl(
        tmp_path / "big/2.jsonl", [{"q": pairs[5]["q"], "a": pairs[5]["a"]}, {"q": "Which?", "a": sentence(77)}]
    )
    thoughts = f"<think>{sentence(300, 40)}</think>{sentence(301, 10)}"
    chat = [{"from": "human", "value": sentence(302, 10)}, {"from": "gpt", "value": thoughts}]
    same = [{"from": "human", "value": pairs[7]["q"]}, {"from": "gpt", "value": pairs[7]["a"]}]
    write_jsonl(tmp_path / "fine.jsonl", [{"chat": chat}, {"chat": same}, {"chat": []}])
    write_jsonl(tmp_path / "exam.jsonl", [{"question": sentence(77)}])
    (tmp_path / "strata.yaml").write_text(STRATA)
    make_tokenizer(tmp_path / "tokenizer")
    return tmp_path


def options_for(raw: Path, **changes: Any) -> CurateOptions:
    return dataclasses.replace(
        CurateOptions(
            [f"big={raw / 'big'}:q,a", f"fine={raw / 'fine.jsonl'}:chat"],
            raw / "curated",
            tokenizer=raw / "tokenizer",
            strata=str(raw / "strata.yaml"),
            decontaminate=[f"exam={raw / 'exam.jsonl'}:question"],
            rows_per_shard=6,
            num_workers=1,
        ),
        **changes,
    )


def curated(output: Path) -> list[Record]:
    return list(read_records(sorted(output.glob("part-*"))))


def test_counts_add_up_and_every_row_is_accounted_for(raw: Path) -> None:
    report = curate(options_for(raw, budget=1e6))
    records, rejected = curated(raw / "curated"), rejects(raw / "curated")
    assert (report.num_rows, report.num_kept, len(records), len(rejected)) == (27, 20, 20, 7)
    assert (
        sum(report.dropped.values()) == 7 and report.dropped["duplicate"] == 2 and report.dropped["contaminated"] == 1
    )
    assert {name: sum(own.values()) for name, own in report.datasets.items()} == {"big": 24, "fine": 3}
    assert report.duplicates == {"big -> big": 1, "fine -> big": 1}
    total = report.strata[ALL]["total"]
    assert total["documents"] == 20 and total["tokens"] == sum(record.meta["tokens"] for record in records)
    for name, groups in report.strata.items():
        members = [one for one in records if name == ALL or name in one.meta["strata"]]
        assert groups["total"]["documents"] == len(members)
        domains = {group: own for group, own in groups.items() if group.startswith("domain ")}
        for count in ("documents", "tokens", "answer_tokens", "thinking_tokens"):
            assert sum(own[count] for own in domains.values()) == groups["total"][count]
    assert CurateReport.read(raw / "curated") == report
    text = (raw / "curated/report.md").read_text()
    times = 1e6 / report.strata["fine"]["total"]["tokens"]
    assert f"| {times:,.2f} times |" in text and "- fine: small and good" in text and "by domain" in text


def test_a_document_of_several_data_sets_is_kept_once_and_is_in_the_strata_of_all(raw: Path) -> None:
    report = curate(options_for(raw))
    [shared] = [record for record in curated(raw / "curated") if len(record.meta["datasets"]) > 1]
    assert shared.id == "b7" and shared.meta["datasets"] == ["big", "fine"]
    assert {"big", "fine", "union"} <= {*shared.meta["strata"]}
    counts = {name: groups["total"]["documents"] for name, groups in report.strata.items()}
    assert (counts["big"], counts["fine"], counts["union"], counts["two"]) == (19, 2, 20, 2)
    tokens = {name: groups["total"]["tokens"] for name, groups in report.strata.items()}
    assert tokens["fine"] - 300 < tokens["control"] <= tokens["fine"]


def test_annotations_are_what_they_say(raw: Path) -> None:
    curate(options_for(raw, annotate=["lengths", "domain", "reasoning", "language", "quality"]))
    by_id = {record.id: record for record in curated(raw / "curated")}
    record = by_id["b9"]
    question, answer = record.text[: record.meta["answer_begin"]], record.text[record.meta["answer_begin"] :]
    assert (question, answer) == (sentence(1009, 9) + "\n", solution(9, 56))
    from megatron_tpt.indexing.tokenizer import Tokenizer

    tokenizer = Tokenizer(raw / "tokenizer")
    assert record.meta["answer_tokens"] == len(tokenizer.encode(answer))
    assert record.meta["tokens"] == len(tokenizer.encode(question.strip())) + record.meta["answer_tokens"]
    assert record.meta["thinking_tokens"] == 0 and record.meta["domain"] == "math"
    assert record.meta["reasoning_intensity"] > 0 and record.meta["gopher_quality"] == "gopher_enough_stop_words"
    assert {"language", "gopher_repetition", "fineweb_quality"} <= record.meta.keys()
    [chat] = [one for one in by_id.values() if "messages" in one.meta]
    assert chat.meta["thinking_tokens"] == len(tokenizer.encode(sentence(300, 40)))
    assert chat.meta["answer_tokens"] > chat.meta["thinking_tokens"] and chat.meta["messages"][0]["from"] == "human"


def test_strata_can_be_by_source_and_what_is_short_of_its_size_is_reported(
    raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (raw / "strata.yaml").write_text(
        "second: {where: \"'2.jsonl' in source\"}\nfirst: {where: \"'1.jsonl' in source\", documents: 100}\n"
        "typed: {where: answer_tokens > '90'}\n"
    )
    report = curate(options_for(raw, decontaminate=[]))
    assert {name: groups["total"]["documents"] for name, groups in report.strata.items()} == {
        ALL: 21, "second": 1, "first": 19, "typed": 0
    }  # fmt: skip
    assert report.warnings == [
        "stratum first: has only 19 of the 100 documents of its size; all are in it",
        "stratum typed: answer_tokens > '90' compares a number with a string in some records, and does not hold of "
        "them",
        "stratum typed: has no document",
    ]
    assert all(warning in capsys.readouterr().err for warning in report.warnings[:1])
    assert "warning: stratum first" in (raw / "curated/report.md").read_text()


def test_near_duplicates_of_other_data_sets_count_too(raw: Path) -> None:
    text = sentence(900, 80)
    variants = [text, f"{text} Yes", f"{text} No"]
    for name, own in zip(("one", "two", "three"), variants, strict=True):
        write_jsonl(raw / f"{name}.jsonl", [{"text": own}, {"text": own}])
    inputs = [f"{name}={raw / name}.jsonl" for name in ("one", "two", "three")]
    changes: dict[str, Any] = {"annotate": ["domain"], "tokenizer": None, "strata": None, "decontaminate": []}
    report = curate(options_for(raw, input=inputs, deduplicate="minhash", **changes))
    [record] = curated(raw / "curated")
    assert record.text == text and record.meta["datasets"] == ["one", "two", "three"]
    assert report.duplicates == {"one -> one": 1, "two -> one": 2, "three -> one": 2}


def test_the_output_is_the_same_for_any_number_of_workers(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_tpt.corpus import prepare as prepare_module

    monkeypatch.setattr(prepare_module, "_BYTES_PER_STRIPE", 100)
    outputs = {}
    for num_workers in (1, 2):
        options = options_for(raw, output=raw / f"curated{num_workers}", num_workers=num_workers)
        curate(options)
        outputs[num_workers] = output_bytes(options.output)
    assert outputs[1] == outputs[2] and len(outputs[1]) > 8


def test_the_output_is_the_same_whenever_documents_are_annotated(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the input is scanned, or once duplicates are known; also with values that JSON does not hold exactly."""
    scores = ["NaN", "1e999", str(10**30), "[1, {}]", "null", "7"]
    rows = [f'{{"q": "?", "a": "{solution(200 + i)}", "score": {score}}}' for i, score in enumerate(scores)]
    write_jsonl(raw / "big/3.jsonl", rows)
    (raw / "strata.yaml").write_text(STRATA + 'missing: {where: score == null}\nhigh: {where: "score > 5"}\n')
    changes: dict[str, Any] = {"annotate": ["lengths", "domain", "reasoning"], "meta_columns": ["score"]}
    curate(options_for(raw, **changes))
    assert list((raw / "curated/.work/scan").rglob("*.found.jsonl.zst"))
    monkeypatch.setattr(curate_options, "IN_SCAN", frozenset())
    curate(options_for(raw, output=raw / "later", **changes))
    assert not list((raw / "later/.work/scan").rglob("*.found.jsonl.zst"))
    assert output_bytes(raw / "curated") == output_bytes(raw / "later")
    strata = {one.text.rpartition(" ")[2]: one.meta["strata"] for one in curated(raw / "later") if "score" in one.meta}
    assert sorted("high" in one for one in strata.values()) == [False, False, False, True, True, True]


def test_the_output_is_what_it_was(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest of what version 0.1 wrote: changes that make the job faster change nothing else."""
    monkeypatch.chdir(raw)
    inputs, exam = ["big=big:q,a", "fine=fine.jsonl:chat"], ["exam=exam.jsonl:question"]
    curate(options_for(Path(), input=inputs, decontaminate=exam, annotate=["lengths", "domain", "reasoning"]))
    lines = [record.__dict__ for record in curated(Path("curated"))] + rejects(Path("curated"))
    report = Path("curated/report.json").read_bytes()
    digest = hashlib.sha256(report + b"".join(json.dumps(line).encode() for line in lines))
    assert digest.hexdigest()[:16] == "9535e051de16bc69"


@pytest.mark.parametrize("stage", ["scan", "annotate", "write"])
def test_a_killed_job_resumes_to_the_same_bytes(raw: Path, stage: str) -> None:
    for number in range(40):  # enough shards for the kill to come between them
        write_jsonl(raw / f"big/more{number}.jsonl", [{"q": "?", "a": solution(100 + number)}])
    expected = options_for(raw, output=raw / "expected", rows_per_shard=2)
    curate(expected)
    command = [sys.executable, str(TOOL), "--output", str(raw / "curated"), "--num-workers", "1"]
    command += ["--input", *expected.input, "--tokenizer", str(raw / "tokenizer"), "--rows-per-shard", "2"]
    command += ["--strata", str(raw / "strata.yaml"), "--decontaminate", *expected.decontaminate]
    process = subprocess.Popen(command)
    deadline_s = time.monotonic() + 120
    while not list((raw / f"curated/.work/{stage}").glob("*/*")):
        assert time.monotonic() < deadline_s and process.poll() is None
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (raw / "curated/report.json").exists()
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "documents kept" in again.stderr
    assert output_bytes(raw / "curated") == output_bytes(expected.output)


def test_other_settings_are_refused_and_the_difference_is_shown(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = options_for(raw)
    report = curate(options)
    assert curate(dataclasses.replace(options, num_workers=2)) == report
    assert "nothing to do" in capsys.readouterr().err
    swapped = [f"fine={raw / 'big'}:q,a", f"big={raw / 'fine.jsonl'}:chat"]
    moved = [f"big={raw / 'big/1.jsonl'}:q,a", f"fine={raw / 'big/2.jsonl'}:q,a", options.input[1]]
    other_columns = [f"big={raw / 'big'}:a,q", options.input[1]]
    for changes, message in [
        ({"annotate": ["lengths"]}, r'annotate was \["lengths", "domain"\], now \["lengths"\]'),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"strata": None}, "strata was .*, now null"),
        ({"input": swapped}, "datasets was"),
        ({"input": other_columns}, "input: 2 changed"),
        ({"input": moved}, "input: 1 changed"),
    ]:
        with pytest.raises(UserError, match=message):
            curate(dataclasses.replace(options, **changes))
    (raw / "strata.yaml").write_text(STRATA.replace("> 90", "> 80"))
    with pytest.raises(UserError, match=r"strata\.long\.where was .*> 90.*, now .*> 80"):
        curate(options)


@pytest.mark.parametrize("is_earlier", [False, True])
def test_files_added_to_the_input_give_what_all_files_give(raw: Path, is_earlier: bool) -> None:
    """Also to a job of an earlier version, which annotated nothing in the scan."""
    options = options_for(raw)
    curate(options)
    for path in (raw / "curated/.work/scan").rglob("*.found.jsonl.zst"):
        if is_earlier:
            path.unlink()
    more = write_jsonl(
        raw / "more.jsonl", [{"q": sentence(1005, 9), "a": solution(5, 40)}, {"q": "?", "a": solution(90)}]
    )
    grown = [*options.input, f"fine={more}:q,a"]
    report = curate(dataclasses.replace(options, input=grown))
    assert report.duplicates["fine -> big"] == 2
    fresh = dataclasses.replace(options, input=grown, output=raw / "fresh")
    curate(fresh)
    outputs = [output_bytes(each.output) for each in (options, fresh)]
    for each in outputs:
        del each["curate.json"]  # which says what was added
    assert outputs[0] == outputs[1]


def test_a_curated_corpus_can_be_curated_again(raw: Path) -> None:
    curate(options_for(raw))
    (raw / "again.yaml").write_text("fine: {where: \"'fine' in datasets\"}\nshort: {where: answer_tokens < 60}\n")
    changes: dict[str, Any] = {"annotate": [], "tokenizer": None, "decontaminate": [], "output": raw / "again"}
    report = curate(options_for(raw, input=[f"all={raw / 'curated'}"], strata=str(raw / "again.yaml"), **changes))
    assert report.num_kept == 20 and report.strata["fine"]["total"]["documents"] == 2
    records = curated(raw / "again")
    assert {tuple(record.meta["strata"]) for record in records} <= {(), ("short",), ("fine",), ("fine", "short")}
    shared = next(record for record in records if record.id == "b7")
    assert shared.meta["datasets"] == ["big", "fine", "all"] and shared.meta["answer_begin"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": None}, "--annotate lengths needs --tokenizer"),
        ({"annotate": ["domain"]}, "--tokenizer has no effect without --annotate lengths"),
        ({"input": ["big.jsonl"]}, "--input big.jsonl: give NAME=FILE"),
        ({"input": ["a b=big.jsonl"]}, "give NAME=FILE"),
        ({"judge": ["x=domain"]}, "--judge and --model need each other"),
        ({"classify": ["x"]}, "--classify x: give NAME=FILE"),
        ({"classify": ["domain=x"]}, "--classify domain=x and --annotate domain both write the field domain"),
        ({"classify": ["x=a", "x=b"]}, "--classify x=b and --classify x=a both write the field x"),
        ({"classify": ["strata=x"]}, "--classify strata=x and every job both write the field strata"),
        ({"meta_columns": ["tokens"]}, "--annotate lengths and --meta-columns both write the field tokens"),
        ({"meta_columns": ["datasets"]}, "--meta-columns and every job both write the field datasets"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(raw: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        options_for(raw, **changes)


def test_mistakes_that_files_show_are_named(raw: Path) -> None:
    twice = [f"big={raw / 'big'}:q,a", f"other={raw / 'big/1.jsonl'}:q,a"]
    with pytest.raises(UserError, match=r"belongs to big=.* and to other=.*; name it once"):
        curate(options_for(raw, input=twice))
    with pytest.raises(UserError, match=r"no classifier is there; give a fastText model"):
        curate(options_for(raw, classify=[f"x={raw}"]))
    (raw / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=r"holds no \*\.safetensors"):
        curate(options_for(raw, classify=[f"x={raw}"]))
    assert not (raw / "curated").exists()  # else the next run would be refused
    (raw / "strata.yaml").write_text("a: {where: asnwer_tokens > 1}\n")
    report = curate(options_for(raw, output=raw / "misspelt"))
    assert report.warnings == [
        "stratum a: no record has asnwer_tokens in its meta", "stratum a: has no document"
    ]  # fmt: skip


def test_a_hugging_face_classifier_annotates_the_same_whatever_is_beside_a_document(raw: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    folder = raw / "classifier"
    make_tokenizer(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | {"pad_token": "<|endoftext|>", "model_max_length": 64})
    )
    torch.manual_seed(0)
    LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=384, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=64, pad_token_id=0, initializer_range=0.5, id2label={0: "poor", 1: "good"},
            label2id={"poor": 0, "good": 1},
        )
    ).save_pretrained(folder)  # fmt: skip
    curate(options_for(raw, classify=[f"grade={folder}"], rows_per_shard=100))
    alone = options_for(raw, classify=[f"grade={folder}"], rows_per_shard=1, output=raw / "alone")
    curate(alone)
    grades = [
        [(one.meta["grade"], one.meta["grade_score"]) for one in curated(raw / name)] for name in ("curated", "alone")
    ]
    assert {label for label, _ in grades[0]} <= {"poor", "good"}
    for (label, score), (label_alone, score_alone) in zip(*grades, strict=True):
        assert label == label_alone and score == pytest.approx(score_alone, abs=1e-3) and score >= 0.5


def test_a_long_document_is_cut_where_a_classifier_has_no_more_positions(raw: Path) -> None:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    folder = raw / "roberta"
    make_tokenizer(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<|endoftext|>"}))
    RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=384, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=18, pad_token_id=1,
        )
    ).save_pretrained(folder)  # fmt: skip
    found = load_classifier("grade", folder).annotate([Document("a b c d e f g h " * 20)])
    assert found[0].keys() == {"grade", "grade_score"}
