import copy
import json
import statistics

from hypothesis import given
from hypothesis import strategies as st

from megatron_tpt.records import Record
from megatron_tpt.thinking.statistics import LengthStatistics, ThinkingStatistics

lengths = st.lists(st.integers(0, 200_000), min_size=2, max_size=200)


def of(values: list[int]) -> LengthStatistics:
    result = LengthStatistics()
    for value in values:
        result.add(value)
    return result


@given(lengths)
def test_mean_and_deviation_are_exact_and_percentiles_are_within_one_percent(values: list[int]):
    result = of(values)
    assert abs(result.mean - statistics.fmean(values)) < 1e-6
    assert abs(result.std - statistics.stdev(values)) < 1e-6
    for percent in (0, 1, 10, 50, 90, 99, 100):
        exact = sorted(values)[max(0, -(-percent * len(values) // 100) - 1)]
        assert abs(result.percentile(percent) - exact) <= 0.01 * exact


@given(lengths, lengths, st.integers(0, 400))
def test_parts_merge_to_the_whole_and_survive_json(first: list[int], second: list[int], cut: int):
    values = first + second
    whole, left, right = of(values), of(values[:cut]), of(values[cut:])
    left.merge(LengthStatistics.from_json(json.loads(json.dumps(right.to_json()))))
    assert left == whole


def test_an_empty_part_changes_nothing():
    result = of([3, 5])
    before = copy.deepcopy(result)
    result.merge(LengthStatistics())
    assert result == before
    assert LengthStatistics.from_json(LengthStatistics().to_json()) == LengthStatistics()


def test_records_and_rejects_are_counted_per_shard_and_merged():
    first, second = ThinkingStatistics(generator_s=1.5), ThinkingStatistics(generator_s=2.0)
    meta = {"document_tokens": 10, "thinking_tokens": 30, "truncated": True, "prompt_tokens": 25}
    first.add_record(Record("a", "d", "t", meta))
    second.add_record(Record("b", "d", "t", {"document_tokens": 20, "thinking_tokens": 0, "truncated": False}))
    second.add_record(Record("c", "d"))  # a record from elsewhere, which says nothing
    second.rejects["loop"] += 1
    second.chunk_rejects["copy"] += 1
    first.rejects.update(["loop", "copy"])
    merged = ThinkingStatistics.from_json(json.loads(json.dumps(second.to_json())))
    assert merged == second
    merged.merge(first)
    assert (merged.records, merged.truncated, merged.prompt_tokens, merged.generator_s) == (3, 1, 25, 3.5)
    assert (merged.rejects, merged.chunk_rejects) == ({"loop": 2, "copy": 1}, {"copy": 1})
    assert (merged.document_tokens.total, merged.thinking_tokens.count, merged.thinking_tokens.mean) == (30, 2, 15)
    assert second.rejects == {"loop": 1}
