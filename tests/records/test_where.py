"""Conditions on `meta`: what they mean, and that nothing else can be in them."""

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_tpt.errors import UserError
from megatron_tpt.records.where import Where

META = {
    "answer_tokens": 5000,
    "score": 0.5,
    "domain": "math",
    "strata": ["ldq", "alf"],
    "nested": {"a": {"b": -1}},
    "is_clean": True,
    "nothing": None,
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("answer_tokens > 4096", True),
        ("4096 < answer_tokens <= 5000 and domain == 'math'", True),
        ("4096 < answer_tokens < 5000", False),
        ("domain in ['math', 'code']", True),
        ("domain not in ['math', 'code']", False),
        ("'alf' in strata and not 'shq' in strata", True),
        ("'at' in domain", True),
        ("nested.a.b == -1", True),
        ("nested.a.b.c == -1", False),
        ("is_clean", True),
        ("is_clean == 1", False),
        ("is_clean == true", True),
        ("nothing == null and missing is null", True),
        ("missing > 1 or missing < 1 or missing in ['a'] or 'a' in missing", False),
        ("not missing > 1", True),
        ("missing != 'math'", True),
        ("domain > 3", False),
        ("domain < 'n'", True),
        ("score >= .5 or domain == 'x'", True),
        ("null in [null]", False),
        ("\n  domain == 'math' ", True),
    ],
)
def test_what_conditions_mean(text: str, expected: bool) -> None:
    where = Where(text)
    assert where.matches(META) is expected
    assert pickle.loads(pickle.dumps(where)).matches(META) is expected


@pytest.mark.parametrize(
    "text",
    [
        "len(domain) > 1",
        "__import__('os').system('true')",
        "domain.upper()",
        "(lambda: 1)()",
        "strata[0] == 'ldq'",
        "answer_tokens + 1 > 2",
        "'a' * 100000000 == domain",
        "[x for x in strata]",
        "domain if score else score",
        "f'{domain}' == 'math'",
        "{'a': 1}",
        "b'a' == domain",
        "x := 1",
        "domain == 'math'; score",
        "domain =",
        "domain == 'math' or 'code'",
        "not 'code'",
        "score and -1",
        "['math']",
        "1",
        "",
        "(" * 3000,
        "domain == 'math' and " * 400 + "score",
        "\x00",
    ],
)
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        Where(text)


def test_the_message_names_the_part() -> None:
    with pytest.raises(UserError, match=r"'len\(domain\)' cannot be part of a condition"):
        Where("score > 0 and len(domain) > 1")
    with pytest.raises(UserError, match=r"is no condition at character \d+: write one such as"):
        Where("domain == == 'math'")


def test_fields_that_no_record_has_are_named() -> None:
    where = Where("answer_token > 4096 or nested.a.b == 1 or domian == 'math'")
    assert where.fields == ["answer_token", "domian", "nested.a.b"]
    where.matches(META)
    assert list(where.notes()) == ["no record has answer_token, domian in its meta"]
    where.matches({"answer_token": 1, "domian": ""})
    assert not list(where.notes())


def test_comparisons_of_values_of_different_kinds_are_named() -> None:
    where = Where("score > 3 and strata == 'ldq' or is_clean == 1")
    assert where.matches({"score": 4, "strata": "ldq", "is_clean": False}) and not list(where.notes())
    assert not where.matches({"score": "4"}) and not where.matches({"score": 4, "strata": ["ldq"], "is_clean": True})
    assert list(where.notes()) == [
        "score > 3 compares a string with a number in some records, and does not hold of them",
        "strata == 'ldq' compares a list with a string in some records, and does not hold of them",
        "is_clean == 1 compares a Boolean with a number in some records, and does not hold of them",
    ]
    for text in ("score != 'n/a'", "score in ['n/a']", "score == null"):  # all of them meaningful
        where = Where(text)
        where.matches({"score": 4})
        assert not list(where.notes())


_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.sampled_from(["", "a", "ab"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2),
    max_leaves=4,
)


@given(a=_values, b=_values)
def test_no_values_break_a_condition(a: Any, b: Any) -> None:
    meta = {"a": a, "b": b}
    for comparison in ("a == b", "a < b", "a >= b", "a in b", "a not in b", "a.b == b", "not a and b"):
        assert Where(comparison).matches(meta) in (True, False)
    assert Where("a in b").matches(meta) is not Where("a not in b").matches(meta)
    if isinstance(a, int | float) and isinstance(b, int | float) and not {type(a), type(b)} & {bool}:
        assert Where("a < b").matches(meta) == (a < b)
