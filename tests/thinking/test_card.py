import json
from pathlib import Path

import pytest
import yaml

from megatron_tpt.records import Record, write_records
from megatron_tpt.thinking.card import write_card
from megatron_tpt.thinking.statistics import ThinkingStatistics

SETTINGS = {
    "model": "some/model",
    "prompt": {"text": "{document}\n\n```\nThink.\n```\n"},
    "input": [{"name": f"file-{i}.jsonl"} for i in range(5000)],
}


def make_output(folder: Path, num_shards: int = 3) -> ThinkingStatistics:
    """An output folder as an augment run leaves it: shards, settings, rejects, and a hidden work folder."""
    statistics = ThinkingStatistics(generator_s=7200)
    for shard in range(num_shards):
        records = []
        for row in range(4):
            meta = {"document_tokens": 10 + row, "thinking_tokens": 100 * (row + 1), "truncated": row == 3}
            if shard:  # what only some records have
                meta["topic"] = {"name": "physics"}
            records.append(Record(f"{shard}-{row}", f"Document {row}.", f"Thinking about {row}.", meta))
            statistics.add_record(records[-1])
        write_records(folder / f"part-{shard:05d}.jsonl.zst", records)
    statistics.rejects["loop"] += 1
    write_records(folder / "rejects/part-00000.jsonl.zst", [Record("bad", "Document.", "Loop.")])
    (folder / "augment.json").write_text(json.dumps(SETTINGS))
    (folder / ".work/progress").mkdir(parents=True)
    (folder / ".work/progress/part-00001.json").write_text("{}")
    return statistics


def test_load_dataset_finds_the_shards_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    output = tmp_path / "thought"
    write_card(output, SETTINGS, make_output(output))
    import datasets

    loaded = datasets.load_dataset(str(output), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["train"]
    rows = loaded["train"]
    assert rows["id"][:] == [f"{shard}-{row}" for shard in range(3) for row in range(4)]
    assert set(rows.column_names) == {"id", "text", "thinking", "meta"}
    assert rows[11]["meta"]["thinking_tokens"] == 400
    assert rows[0]["text"] == "Document 0."
    assert rows[11]["meta"]["topic"] == {"name": "physics"}
    assert "topic" not in rows[0]["meta"]


def test_the_card_says_what_was_counted_and_how_it_came_about(tmp_path: Path):
    write_card(tmp_path, SETTINGS, make_output(tmp_path))
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["size_categories"] == ["n<1K"]
    for line in [
        "| records | 12 |",
        "| thinking that was truncated at the limit | 3 (25.0%) |",
        "| tokens of thinking | 3,000 |",
        "| document and thinking together, per document token | 22.74 |",
        "| device hours of the generator (a server elsewhere is one device) | 2.00 |",
        "| loop | 1 (7.7%) |",
    ]:
        assert line in text.splitlines()
    [row] = [line for line in text.splitlines() if line.startswith("| thinking | 2")]
    assert row.startswith("| thinking | 250 | 117 | ")
    assert "`some/model`" in text
    assert '"... 4,980 more"' in text


def test_settings_cannot_break_out_of_their_block(tmp_path: Path):
    write_card(tmp_path, SETTINGS, ThinkingStatistics())
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    block = text[text.index("```json\n") + len("```json\n") :].removesuffix("```\n")
    assert json.loads(block)["prompt"] == SETTINGS["prompt"]
    assert not any(line.startswith("```") for line in block.splitlines())


def test_a_card_without_records_has_no_figures_that_are_none(tmp_path: Path):
    write_card(tmp_path, {}, ThinkingStatistics())
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| records | 0 |" in text and "nan" not in text
