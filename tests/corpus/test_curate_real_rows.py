"""Strata of real rows: problems with solutions, tool-use traces, web documents, and an audit's contaminated pairs.

The data are of others, see evaluation_data.py.
"""

import pytest
from corpus_files import write_jsonl
from evaluation_data import DATA, needs_data, rows
from tiny_models import make_tokenizer

from megatron_tpt.corpus.curate import curate
from megatron_tpt.corpus.curate_options import CurateOptions
from megatron_tpt.corpus.curate_report import ALL, CurateReport
from megatron_tpt.records import Record, read_records

STRATA = """\
ldq: {where: "'ldq' in datasets"}
shq: {where: "'shq' in datasets"}
lmq: {any_of: [ldq, shq]}
alf: {of: ldq, where: answer_tokens > 1024}
alf_shq: {any_of: [alf, shq]}
ldq_as_shq: {of: ldq, size_of: shq}
web: {where: "'web' in datasets"}
"""
NUM_ROWS = {"web": 300 + 30 + 18, "ldq": 1000 + 300 + 36, "shq": 200 + 50}


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> tuple[CurateReport, list[Record]]:
    """LDQ: GSM8K, most of s1K, the training problems of an audit. SHQ: half of s1K, traces. C4, Dolma, Wikipedia."""
    folder = tmp_path_factory.mktemp("curated")
    make_tokenizer(folder / "tokenizer")
    (folder / "strata.yaml").write_text(STRATA)
    s1k = rows("s1k_problems_solutions_400")
    most, half = write_jsonl(folder / "most.jsonl", s1k[:300]), write_jsonl(folder / "half.jsonl", s1k[200:])
    audit = rows("contamination_s1_lexical")
    pairs = write_jsonl(folder / "audit.jsonl", ({"q": pair["train_problem"], "a": "So it is."} for pair in audit))
    problems = dict.fromkeys(pair["math500_problem"] for pair in audit)
    exam = write_jsonl(folder / "exam.jsonl", ({"problem": text} for text in problems))
    web = [f"web={DATA / f'web_documents_{name}.jsonl'}" for name in ("c4", "dolma", "wikipedia")]
    report = curate(
        CurateOptions(
            [
                *web,
                f"ldq={DATA / 'gsm8k_train_1000.jsonl'}:question,answer",
                f"ldq={most}:problem,solution",
                f"ldq={pairs}:q,a",
                f"shq={half}:problem,solution",
                f"shq={DATA / 'sft_reasoning_tool_use_50.jsonl'}:messages",
            ],
            folder / "curated",
            annotate=["lengths", "domain", "reasoning"],
            tokenizer=folder / "tokenizer",
            strata=str(folder / "strata.yaml"),
            decontaminate=[f"math500={exam}:problem"],
            ngram=8,
            num_workers=1,
        )
    )
    return report, list(read_records(sorted((folder / "curated").glob("part-*"))))


@needs_data
def test_counts_add_up_over_real_rows(curated: tuple[CurateReport, list[Record]]) -> None:
    report, records = curated
    assert {name: sum(own.values()) for name, own in report.datasets.items()} == NUM_ROWS
    assert report.num_rows == sum(NUM_ROWS.values()) == report.num_kept + sum(report.dropped.values())
    assert set(report.dropped) == {"contaminated", "duplicate"}, "a real row could not be read"
    documents = {name: groups["total"]["documents"] for name, groups in report.strata.items()}
    num_shared = sum({"ldq", "shq"} <= {*record.meta["datasets"]} for record in records)
    assert documents[ALL] == len(records) == report.num_kept
    assert documents["lmq"] == documents["ldq"] + documents["shq"] - num_shared
    assert 75 < num_shared <= 100 and report.duplicates["shq -> ldq"] == num_shared
    tokens = {name: groups["total"]["tokens"] for name, groups in report.strata.items()}
    longest = max(record.meta["tokens"] for record in records if "ldq" in record.meta["strata"])
    assert tokens["shq"] - longest < tokens["ldq_as_shq"] <= tokens["shq"] < tokens["ldq"]


@needs_data
def test_the_audits_pairs_are_found(curated: tuple[CurateReport, list[Record]]) -> None:
    """61% of them, as tests/corpus/test_audited_overlaps.py has it."""
    report, records = curated
    pairs = rows("contamination_s1_lexical")
    texts = "\n".join(record.text for record in records)
    num_found = sum(pair["train_problem"] not in texts for pair in pairs)
    assert 0.58 <= num_found / len(pairs) <= 0.75
    assert 12 <= report.evaluation_sets["math500"]["items_found"] <= len({pair["math500_problem"] for pair in pairs})


@needs_data
def test_domains_and_traces_of_real_rows_are_recognized(curated: tuple[CurateReport, list[Record]]) -> None:
    report, records = curated
    shares = {
        name: groups.get("domain math", {}).get("tokens", 0) / groups["total"]["tokens"]
        for name, groups in report.strata.items()
    }
    assert shares["ldq"] > 0.85 and shares["web"] < 0.05
    traces = [record for record in records if "messages" in record.meta]
    assert len(traces) == 50 and all(record.meta["thinking_tokens"] > 50 for record in traces)
    assert all(record.meta["tools"] for record in traces)
    reasoning = {
        name: sum(one.meta["reasoning_intensity"] for one in records if name in one.meta["strata"])
        / report.strata[name]["total"]["documents"]
        for name in ("web", "shq")
    }
    assert reasoning["shq"] > 1.3 * reasoning["web"]


@needs_data
def test_shares_of_domains_and_data_sets_are_reported(curated: tuple[CurateReport, list[Record]]) -> None:
    report, records = curated
    text = report.to_markdown()
    for kind, names in (("domain", {"math", "code", "science", "general"}), ("dataset", {"web", "ldq", "shq"})):
        head, _, *lines = text.partition(f"### Share of tokens by {kind}\n\n")[2].partition("\n\n")[0].splitlines()
        columns = [cell.strip() for cell in head.strip("|").split("|")][1:]
        assert {*columns} <= names
        found = {name.strip(): cells for name, *cells in (line.strip("|").split("|") for line in lines)}
        assert list(found) == list(report.strata)
        tokens = sum(record.meta["tokens"] for record in records)
        for place, name in enumerate(columns):
            own = [one for one in records if name == one.meta["domain"] or name in one.meta["datasets"]]
            assert found[ALL][place].strip() == f"{sum(one.meta['tokens'] for one in own) / tokens:.1%}"
