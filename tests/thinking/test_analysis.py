import csv
import math
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_tpt.errors import UserError
from megatron_tpt.records import Record, write_records
from megatron_tpt.thinking import analysis
from megatron_tpt.thinking.analysis import NONE, OTHER, analyze, value_of
from megatron_tpt.thinking.analysis_options import AnalysisOptions

TOOL = Path(__file__).parents[2] / "tools/analyze_thinking.py"
MEANS = {"mathematics": 900, "physics": 800, "history": 500, "sports": 300}


def make_records(folder: Path, num_documents: int = 400) -> list[Record]:
    """Records whose thinking is longer in some domains, in two shards; some say nothing of their domain."""
    generator = random.Random(0)
    records = []
    for number in range(num_documents):
        domain = generator.choice(list(MEANS))
        length = round(generator.gauss(MEANS[domain], 60))
        meta: dict[str, Any] = {"document_tokens": 200, "thinking_tokens": length, "truncated": length > 900}
        meta["labels"] = {"level": generator.randrange(3), "tags": ["a", "b"]}
        if number % 10:
            meta["domain"] = domain
        records.append(Record(str(number), f"Document {number}.", "A thought.", meta))
    for shard in range(2):
        write_records(folder / f"part-{shard:05d}.jsonl.zst", records[shard::2])
    return records


def options_for(folder: Path, by: str, **changes: Any) -> AnalysisOptions:
    return AnalysisOptions(**{"input": [str(folder / "thought")], "by": by, "output": folder / "report"} | changes)


def read_csv(path: Path) -> dict[str, dict[str, float]]:
    with path.open(encoding="utf-8", newline="") as file:
        return {
            row["group"]: {name: float(value or "nan") for name, value in row.items() if name != "group"}
            for row in csv.DictReader(file)
        }


def test_figures_of_every_group_are_those_of_its_records(tmp_path: Path):
    records = make_records(tmp_path / "thought")
    analyze(options_for(tmp_path, "domain,labels.level"))
    rows = read_csv(tmp_path / "report/domain.csv")
    assert list(rows) == [*MEANS, NONE, "all"]  # the longest first
    overall = statistics.fmean(record.meta["thinking_tokens"] for record in records)
    for name, row in rows.items():
        lengths = [
            record.meta["thinking_tokens"] for record in records if name in ("all", record.meta.get("domain", NONE))
        ]
        mean = statistics.fmean(lengths)
        half = 1.96 * statistics.stdev(lengths) / math.sqrt(len(lengths))
        assert row["documents"] == len(lengths)
        assert row["mean_thinking_tokens"] == pytest.approx(mean)
        assert (row["95_low"], row["95_high"]) == (pytest.approx(mean - half), pytest.approx(mean + half))
        assert row["median"] == pytest.approx(statistics.median_low(lengths), rel=0.01)
        assert row["per_document_token"] == pytest.approx(mean / 200)
        assert row["cut_at_the_limit"] == pytest.approx(sum(length > 900 for length in lengths) / len(lengths))
        assert row["to_overall_mean"] == pytest.approx(mean / overall)
    assert read_csv(tmp_path / "report/labels.level.csv").keys() == {"0", "1", "2", "all"}


def test_the_report_has_a_table_and_a_picture_for_every_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_records(tmp_path / "thought")
    analyze(options_for(tmp_path, "domain, labels.level ,domain"))
    text = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    assert text.count("## By domain") == 1 and "![](labels.level.png)" in text
    assert text.strip() == capsys.readouterr().out.strip()
    for name in ("domain.png", "labels.level.png"):
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")
    assert not [path for path in (tmp_path / "report").iterdir() if path.name.startswith(".")]


def test_rare_groups_are_put_together_and_lose_no_document(tmp_path: Path):
    records = make_records(tmp_path / "thought", 100)
    odd = [Record(f"x{i}", "Text.", "Thought.", records[0].meta | {"domain": f"odd | {i}"}) for i in range(7)]
    write_records(tmp_path / "thought/part-00002.jsonl.zst", odd)
    analyze(options_for(tmp_path, "domain", min_documents=8))
    rows = read_csv(tmp_path / "report/domain.csv")
    assert list(rows)[-3:] == [OTHER, NONE, "all"]
    assert rows[OTHER]["documents"] == 7
    assert sum(row["documents"] for row in rows.values()) == 2 * 107
    analyze(options_for(tmp_path, "domain", min_documents=1))
    assert read_csv(tmp_path / "report/domain.csv")["odd | 3"]["documents"] == 1
    report = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    assert "| odd \\| 3 | 1 | " in report and " | - | - | " in report and "nan" not in report


def test_many_groups_with_odd_names_are_drawn(tmp_path: Path):
    meta = {"document_tokens": 5, "thinking_tokens": 9}
    records = [Record(str(i), "Text.", "Thought.", meta | {"name": f"$x_{i}${{}} " + "long " * 30}) for i in range(60)]
    write_records(tmp_path / "thought/a.jsonl", records)
    analyze(options_for(tmp_path, "name", min_documents=1))
    assert (tmp_path / "report/name.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("a", "x y"),
        ("b.c", "3"),
        ("b.d.e", "true"),
        ("f.g", "whole"),
        ("list", '["u", "v"]'),
        ("b", '{"c": 3, "d": {"e": true}}'),
        *((name, NONE) for name in ("null", "empty", "nothing", "b.x", "a.x", "b.c.x")),
    ],
)
def test_values_are_found_by_dotted_names(column: str, value: str):
    meta = {"a": " x\ny", "b": {"c": 3, "d": {"e": True}}, "f.g": "whole", "f": {"g": 1}, "list": ["u", "v"]}
    assert value_of(meta | {"null": None, "empty": []}, column) == value


def test_columns_and_records_that_cannot_be_compared_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_records(tmp_path / "thought", 50)
    with pytest.raises(UserError, match=r"--by domian: .*there are: document_tokens, domain, labels\.level, labels"):
        analyze(options_for(tmp_path, "domian"))
    with pytest.raises(UserError, match="give columns"):
        options_for(tmp_path, "domain,,level")
    monkeypatch.setattr(analysis, "_MAX_GROUPS", 3)
    with pytest.raises(UserError, match="more than 3 values"):
        analyze(options_for(tmp_path, "domain"))
    write_records(tmp_path / "plain.jsonl", [Record("a", "Text.")])
    with pytest.raises(UserError, match="no record has thinking"):
        analyze(options_for(tmp_path, "domain", input=[str(tmp_path / "plain.jsonl")]))
    assert not (tmp_path / "report").exists()


def test_the_command_reports_and_ends_with_code_2_for_mistakes(tmp_path: Path):
    make_records(tmp_path / "thought", 100)
    command = [sys.executable, str(TOOL), "--input", str(tmp_path / "thought"), "--output", str(tmp_path / "report")]
    done = subprocess.run([*command, "--by", "domain"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "## By domain" in done.stdout
    wrong = subprocess.run([*command, "--by", "nothing"], capture_output=True, text=True)
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1
