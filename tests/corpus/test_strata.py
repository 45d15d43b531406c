"""Strata: their definitions, and which documents one with a size takes."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from megatron_tpt.corpus.strata import Strata, Stratum, find_limit, known_definitions, with_limits
from megatron_tpt.errors import UserError


def shards_of(seed: int, sizes: list[int], *, num_bits: int = 64) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [
        np.stack(
            [
                np.full(n, 2**63 - 1, np.uint64),
                draw.integers(0, 2**num_bits, n, np.uint64),
                draw.integers(1, 5000, n).astype(np.uint64),
            ]
        )
        for n in sizes
    ]


@pytest.mark.parametrize("num_bits", [64, 20, 3])  # 3: many equal hashes
def test_a_limit_is_the_highest_that_keeps_to_the_size(num_bits: int) -> None:
    shards = shards_of(1, [50, 0, 300, 1], num_bits=num_bits)
    hashes, sizes = (np.concatenate([shard[row] for shard in shards]) for row in (1, 2))
    total = int(sizes.sum())
    sums = [int(sizes[hashes <= value].sum()) for value in np.unique(hashes)]
    for wanted in (0, 1, 4000, total // 3, sums[len(sums) // 2], sums[0], total - 1, total, total + 5):
        limit, found_total = find_limit(lambda: ((shard[1], shard[2]) for shard in shards), wanted)
        assert found_total == total or limit is not None
        expected = max([size for size in sums if size <= wanted], default=0)
        taken = total if limit is None else int(sizes[hashes < np.uint64(limit)].sum())
        assert taken == expected


def test_strata_are_in_terms_of_those_above_them(tmp_path: Path) -> None:
    path = tmp_path / "strata.yaml"
    path.write_text(
        "a: {where: \"'a' in datasets\"}\nb: {where: \"'b' in datasets\"}\nboth: {any_of: [a, b]}\n"
        "long: {of: a, where: answer_tokens > 10}\nhalf: {of: both, documents: 2}\n"
    )
    strata = pickle.loads(pickle.dumps(Strata.read(path)))
    metas = [
        {"datasets": ["a"], "answer_tokens": 20},
        {"datasets": ["b"], "answer_tokens": 20},
        {"datasets": ["a", "b"], "answer_tokens": 5},
        {"datasets": ["c"]},
    ]
    bits = np.array([strata.bits(meta) for meta in metas], np.uint64)
    hashes, tokens = np.array([7, 3, 2**64 - 1, 0], np.uint64), np.ones(4, np.uint64)
    strata, notes = with_limits(strata, lambda: [np.stack([bits, hashes, tokens])])
    found = {name: np.flatnonzero(is_in).tolist() for name, is_in in strata.members(bits, hashes).items()}
    assert found == {"a": [0, 2], "b": [1, 2], "both": [0, 1, 2], "long": [0], "half": [0, 1]}
    assert notes == []


def test_a_control_has_the_size_of_another_stratum_and_sizes_are_nested() -> None:
    strata = Strata(
        {
            "all": Stratum(where="true"),
            "small": Stratum(of="all", documents=20),
            "control": Stratum(of="all", size_of="small"),
            "one": Stratum(of="all", documents=100),
            "two": Stratum(of="all", documents=200),
            "too_many": Stratum(of="all", documents=900),
        }
    )
    shards = shards_of(2, [200, 151])
    strata, notes = with_limits(strata, lambda: shards)
    members = [strata.members(shard[0], shard[1]) for shard in shards]
    counts = {name: sum(int(own[name].sum()) for own in members) for name in strata.strata}
    assert counts == {"all": 351, "small": 20, "control": counts["control"], "one": 100, "two": 200, "too_many": 351}
    tokens = {
        name: sum(int(shard[2][own[name]].sum()) for shard, own in zip(shards, members, strict=True))
        for name in ("small", "control")
    }
    assert tokens["control"] == tokens["small"]  # the same hashes: here the same documents
    assert all((own["one"] <= own["two"]).all() and (own["small"] <= own["one"]).all() for own in members)
    assert notes == ["stratum too_many: has only 351 of the 900 documents of its size; all are in it"]


def test_a_size_in_tokens_needs_tokens() -> None:
    strata = Strata({"all": Stratum(where="true"), "part": Stratum(of="all", tokens=5)})
    shard = np.stack([np.full(3, 3), np.arange(3), np.zeros(3)]).astype(np.uint64)
    with pytest.raises(UserError, match="no document has them in its meta: give --annotate lengths"):
        with_limits(strata, lambda: [shard])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {of: b}\nb: {where: x}\n", r"a: b is not a stratum above it, of which there are 0"),
        ("a: {about: nothing}\n", r"strata\.yaml:1: a stratum needs where, of or any_of"),
        ("a: {where: x, tokens: 5, documents: 5}\n", r"a stratum has one size: give one of tokens and documents"),
        ("a: {where: x, unit: documents}\n", r"unit: documents is what size_of counts"),
        ("a: {where: 'f(x)'}\n", r"'f\(x\)' cannot be part of a condition"),
        ("a: {wehre: x}\n", r"strata\.yaml:1: a\.wehre: unknown; known there: where, of"),
        ("", r"holds no stratum"),
        ("[a]\n", r"is not a mapping"),
    ],
)
def test_mistakes_in_definitions_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "strata.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        Strata.read(path)


def test_the_definitions_of_the_package_are_those_of_the_paper() -> None:
    assert known_definitions() == ["front_loading"]
    strata = Strata.read("front_loading")
    assert list(strata.strata)[:6] == ["ldq", "shq", "lmq", "alf", "alf_shq", "ldq_as_shq"]
    assert strata.strata["alf"].where == "answer_tokens > 4096" and strata.strata["alf"].of == "ldq"
    metas = [{"datasets": ["ldq"], "answer_tokens": n} for n in (4096, 4097)] + [{"datasets": ["shq", "ldq"]}]
    bits = np.array([strata.bits(meta) for meta in metas], np.uint64)
    members = strata.members(bits, np.zeros(3, np.uint64))
    assert [members[name].tolist() for name in ("ldq", "shq", "lmq", "alf", "alf_shq")] == [
        [True] * 3, [False, False, True], [True] * 3, [False, True, False], [False, True, True]
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"give a YAML file, or one of the definitions front_loading"):
        Strata.read("frontloading")
