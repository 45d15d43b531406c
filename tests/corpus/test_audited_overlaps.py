"""Decontamination against an audit: pairs of a MATH-500 problem and a training problem that share runs of words.

The pairs are data of others (MIT, ademcodesproducts/contamination-audit), see evaluation_data.py.
"""

from pathlib import Path

import pytest
from corpus_files import sentence, write_jsonl
from evaluation_data import needs_data, rows

from megatron_tpt.corpus.options import PrepareOptions
from megatron_tpt.corpus.prepare import prepare
from megatron_tpt.corpus.report import Report


def test_the_report_names_the_items_that_a_corpus_holds_also_of_list_columns(tmp_path: Path) -> None:
    items = [{"question": sentence(i, 30), "choices": [sentence(100 + i, 20), "no"]} for i in range(6)]
    exam = write_jsonl(tmp_path / "exam.jsonl", items)
    texts = [sentence(50, 60), f"{sentence(51)} {items[1]['question']}", f"{items[4]['choices'][0]} {sentence(52)}"]
    texts.append(f"{items[1]['question']} {items[2]['question']}")
    raw = write_jsonl(tmp_path / "raw.jsonl", ({"text": text} for text in texts))
    report = prepare(
        PrepareOptions(
            [raw], tmp_path / "clean", decontaminate=[f"exam={exam}:question,choices", f"other={exam}:choices"],
            rows_per_shard=2, num_workers=1,
        )
    )  # fmt: skip
    assert report.found_items == {"exam": [2, 3, 5], "other": [5]}
    assert [report.evaluation_sets[name]["items_found"] for name in ("exam", "other")] == [3, 1]
    lines = (tmp_path / "clean/report.md").read_text().splitlines()
    assert "- exam: 3 of 6 items overlap the corpus as it was: 2, 3, 5" in lines
    assert Report.read(tmp_path / "clean") == report


@needs_data
@pytest.mark.parametrize(
    ("name", "ngram", "percent"), [("openthoughts", 13, 40), ("openthoughts", 8, 84), ("s1", 13, 19), ("s1", 8, 61)]
)
def test_the_share_of_an_audits_pairs_that_is_found(name: str, ngram: int, percent: int, tmp_path: Path) -> None:
    """The audit counts pieces of LaTeX as words, so that its runs of 8 or 13 are shorter than ours."""
    pairs = rows(f"contamination_{name}_lexical")
    problems = list(dict.fromkeys(pair["math500_problem"] for pair in pairs))
    exam = write_jsonl(tmp_path / "exam.jsonl", ({"problem": text} for text in problems))
    texts = [pair["train_problem"] for pair in pairs] + [sentence(1, 60)]
    raw = write_jsonl(tmp_path / "raw.jsonl", ({"text": text} for text in texts))
    report = prepare(
        PrepareOptions(
            [raw], tmp_path / "clean", decontaminate=[f"math500={exam}:problem"], deduplicate="none", num_workers=1,
            ngram=ngram,
        )
    )  # fmt: skip
    assert round(100 * report.evaluation_sets["math500"]["documents"] / len(pairs)) == percent
