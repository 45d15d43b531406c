"""IFEval's instructions: what follows each of them, and what does not."""

from typing import Any

import pytest

from megatron_tpt.grading import Grader, GraderPool, Item, Rules
from megatron_tpt.grading.instructions import _CHECKS

CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["ferry", "quay"]}, ["The Ferry left the quay."], ["The ferry left."]),
    ("keywords:frequency", {"keyword": "tea", "frequency": 2, "relation": "at least"}, ["Tea, tea"], ["tea"]),
    ("keywords:frequency", {"keyword": "tea", "frequency": 2, "relation": "less than"}, ["tea"], ["Tea, tea"]),
    ("keywords:forbidden_words", {"forbidden_words": ["bad"]}, ["a badger"], ["That is Bad."]),
    ("keywords:letter_frequency", {"letter": "Q", "let_frequency": 2, "let_relation": "at least"}, ["q Q"], ["q"]),
    ("language:response_language", {"language": "de"},
     ["Die Fähre fährt um neun, und viele Leute warten am Kai."], ["The ferry leaves at nine, and people wait."]),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "at least"},
     ["One is here. Two is there! Three?"], ["One is here. Two is there."]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, ["a\n***\nb", "***\na *** b"],
     ["a", "a\n***\n***\nb"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["two words"], ["it's three"]),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"}, ["a\n\n\"then, b"], ["a\n\nso then", "Then"]),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[name], [street]"], ["[name]"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["Bye.\nP.S. More"], ["Bye.\nPS More"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["Bye.\np.p.s more"], ["Bye.\nP.S. More"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n - b"],
     ["* a", "**a**\n* b", "* a\n* b\n- c"]),
    ("detectable_format:constrained_response", {}, ["Well. My answer is maybe."], ["Maybe."]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, ["*a* and **b**"], ["*a* and ****"]),
    ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2},
     ["SECTION 1\na\nSECTION 2\nb"], ["SECTION 1\na"]),
    ("detectable_format:json_format", {}, ['```json\n{"a": [1]}\n```', "[]"], ["{'a': 1}", "[" * 5000]),
    ("detectable_format:title", {}, ["<<A day>>\nIt was"], ["<A day>", "<<  >>"]),
    ("combination:two_responses", {}, ["a\n******\nb"], ["a", "a ****** a", "a******b******c"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say this. "}, ["say this. And"], ["I say this."]),
    ("startend:end_checker", {"end_phrase": "Any questions?"}, ['He said: any questions?"\n'], ["Any questions? No."]),
    ("startend:quotation", {}, [' "All of it." '], ['"', 'He said "yes"']),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"},
     ["THE USA."], ["The USA"]),
    ("change_case:english_capital", {}, ["THE FERRY LEAVES AT NINE, AND PEOPLE ARE WAITING."],
     ["The ferry leaves.", "DIE FÄHRE FÄHRT UM NEUN, UND VIELE LEUTE WARTEN."]),
    ("change_case:english_lowercase", {}, ["the ferry leaves at nine, and people are waiting."], ["The ferry leaves."]),
    ("punctuation:no_comma", {}, ["No commas here."], ["One, two"]),
]  # fmt: skip


def reference(*instructions: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return {"instruction_id_list": [name for name, _ in instructions], "kwargs": [given for _, given in instructions]}


@pytest.mark.parametrize(("name", "given", "right", "wrong"), CASES)
def test_an_instruction_is_followed_or_not(
    name: str, given: dict[str, Any], right: list[str], wrong: list[str]
) -> None:
    grader = Grader(Rules("instructions"))
    # A table of instructions has a column for every argument.
    row = reference((name, {"num_highlights": None, "language": None} | given))
    assert [text for text in right if not grader.grade(Item(text, row)).correct] == []
    assert [text for text in wrong if grader.grade(Item(text, row)).correct] == []


def test_all_instructions_have_cases() -> None:
    assert {name for name, *_ in CASES} == set(_CHECKS) and len(_CHECKS) == 25


def test_all_instructions_of_a_prompt_must_be_followed_and_those_missed_are_named() -> None:
    row = reference(("punctuation:no_comma", {}), ("startend:quotation", {}), ("detectable_format:title", {}))
    texts = [
        '"<<A day>> it was"',
        '<think>, </think>"<<A day>> it was"',
        '"<<A day>>, it was"',
        "It was",
        "",
        "<think>",
    ]
    with GraderPool(Rules("instructions")) as pool:
        grades = pool.grade([Item(text, row) for text in texts])
    assert [grade.correct for grade in grades] == [True, True, False, False, False, False]
    assert [grade.tier for grade in grades[:3]] == ["instructions", "instructions", None]
    assert [grade.detail for grade in grades[:4]] == [
        "", "", "punctuation:no_comma", "startend:quotation, detectable_format:title"
    ]  # fmt: skip
    assert [grade.reason for grade in grades[2:]] == ["different", "different", "no answer", "thinking not closed"]


@pytest.mark.parametrize(
    "value",
    [
        "punctuation:no_comma",
        {"instruction_id_list": ["punctuation:no_comma"], "kwargs": []},
        reference(("punctuation:no_dash", {})),
        reference(("startend:end_checker", {})),
        {"instruction_id_list": ["punctuation:no_comma"], "kwargs": ["{}"]},
        {"instruction_id_list": [["x"]], "kwargs": [{}]},
        {"instruction_id_list": [None], "kwargs": [None]},
        reference(("startend:end_checker", {"end_phrase": 1})),
        reference(("keywords:existence", {"keywords": "ferry"})),
        reference(("keywords:existence", {"keywords": [1]})),
        reference(("detectable_format:number_bullet_lists", {"num_bullets": "2"})),
        reference(("detectable_format:number_bullet_lists", {"num_bullets": 2.5})),
        reference(("detectable_format:number_bullet_lists", {"num_bullets": True})),
        reference(("length_constraints:number_words", {"num_words": 3, "relation": "at most"})),
        reference(("length_constraints:number_words", {"num_words": 3, "relation": ["at least"]})),
        reference(),
    ],
)
def test_references_that_are_no_instructions_are_known(value: Any) -> None:
    assert Grader(Rules("instructions")).reference(value) is None


def test_numbers_may_be_those_of_a_table_with_gaps() -> None:
    row = reference(
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2.0, "nth_paragraph": 2.0, "first_word": "b"},
        )
    )
    assert Grader(Rules("instructions")).grade(Item("a\n\nb", row)).correct
