"""Grades agree with those of others: reference answers of benchmarks, and outputs of real models with their labels."""

import re
from collections.abc import Iterable

import pytest
from evaluation_data import needs_data, rows

from megatron_tpt.grading import Grade, Grader, GraderPool, Item, Reading, Rules

pytestmark = needs_data


def grades(kind: str, items: Iterable[Item], reading: Reading | None = None) -> list[Grade]:
    with GraderPool(Rules(kind, reading or Reading())) as pool:  # type: ignore[arg-type]
        return pool.grade(items)


def test_every_solution_of_gsm8k_has_its_own_answer() -> None:
    answers = [row["answer"] for row in rows("gsm8k_test")]
    found = grades("number", [Item(answer, answer) for answer in answers])
    golds = [answer.rpartition("####")[2].replace(",", "").strip() for answer in answers]
    assert (len(found), [grade.extracted for grade in found]) == (1319, golds)
    assert all(grade.correct for grade in found)


def test_outputs_of_gsm8k_have_their_official_labels() -> None:
    outputs = [
        (Item(part["solution"], row["ground_truth"]), part["is_correct"])
        for row in rows("gsm8k_graded_outputs")
        for part in row.values()
        if isinstance(part, dict)
    ]
    found = grades("number", (item for item, _ in outputs))
    wrong = [item for (item, label), grade in zip(outputs, found, strict=True) if grade.correct != label]
    assert (len(outputs), wrong) == (2638, [])


@pytest.mark.parametrize(
    ("name", "number", "misread_as"),
    [
        ("math500", 500, {"3\\sqrt{13}": "3", "6 - 5i": "5", "1,-2": "1"}),
        ("hmmt_feb25", 30, {"2^{25} \\cdot 26!": "26"}),
    ],
)
def test_references_are_right_and_what_bare_latex_makes_of_them_is_wrong(
    name: str, number: int, misread_as: dict[str, str]
) -> None:
    math_verify = pytest.importorskip("math_verify")
    sympy = pytest.importorskip("sympy")
    golds = [row["answer"] for row in rows(name)]
    found = grades("math", [Item(f"Therefore $\\boxed{{{gold}}}$.", gold) for gold in golds])
    assert (len(golds), [gold for gold, grade in zip(golds, found, strict=True) if not grade.correct]) == (number, [])

    misread = []
    for gold in golds:
        bare = math_verify.parse(gold, parsing_timeout=None)  # its limits are signals, as those of tests
        whole = math_verify.parse(f"\\boxed{{{gold}}}", [math_verify.LatexExtractionConfig()], parsing_timeout=None)
        if (
            bare
            and whole
            and not math_verify.verify(whole, bare, timeout_seconds=None)
            and not isinstance(bare[0], str)
        ):
            misread.append(Item(f"\\boxed{{{sympy.latex(bare[0])}}}", gold))
    found_as = {item.reference: item.output for item in misread}
    assert misread_as.items() <= {gold: output[7:-1] for gold, output in found_as.items()}.items()
    accepted = [item for item, grade in zip(misread, grades("math", misread), strict=True) if grade.correct]
    assert (len(misread) >= number / 10, accepted) == (True, [])


@pytest.mark.parametrize(("name", "column"), [("olympiadbench_338", "final_answer"), ("hmmt_feb25", "answer")])
def test_references_of_olympiads_are_right_in_a_box(name: str, column: str) -> None:
    values = [row[column] for row in rows(name)]
    texts = [", ".join(value) if isinstance(value, list) else value for value in values]
    found = grades(
        "math", [Item(f"\\boxed{{{text.replace('$', '')}}}", v) for text, v in zip(texts, values, strict=True)]
    )
    assert [text for text, grade in zip(texts, found, strict=True) if not grade.correct] == []


def test_no_right_output_of_math_is_denied() -> None:
    outputs = [
        (Item(output, row["gt"]), score)
        for row in rows("math_graded_outputs_50")
        for output, score in zip(row["code"], row["score"], strict=True)
    ]
    found = grades("math", (item for item, _ in outputs))
    denied = [item for (item, score), grade in zip(outputs, found, strict=True) if score and not grade.correct]
    assert (len(outputs), sum(score for _, score in outputs), denied) == (400, 375, [])


def test_cases_of_a_grader_are_decided_as_expected_and_nothing_wrong_is_accepted() -> None:
    cases = rows("grader_cases")
    found = grades("math", [Item(case["output"], case["gold"]) for case in cases])
    pairs = list(zip(cases, found, strict=True))
    accepted = [case for case, grade in pairs if grade.correct and not case["expected"] and not case["debatable"]]
    assert (len(cases), accepted) == (2536, [])
    clear = [(case, grade) for case, grade in pairs if not case["debatable"]]
    for sample in (pairs, clear):
        agreement = sum(case["expected"] == grade.correct for case, grade in sample) / len(sample)
        assert agreement >= 0.995, [case for case, grade in sample if case["expected"] != grade.correct]


def test_outputs_of_mmlu_pro_are_read_as_the_official_script_reads_them() -> None:
    """Its third attempt, the last letter of the output, is a guess where no answer exists."""
    stated = [row for row in rows("mmlu_pro_504_outputs") if re.search(r"answer is \(?[A-J]\)?", row["output"])]
    items = [Item(row["output"], row["answer"], tuple(row["options"])) for row in stated]
    found = grades("choice", items, Reading(first=True, stop=("Question:",)))
    differing = [
        (row["pred"], grade.extracted)
        for row, grade in zip(stated, found, strict=True)
        if grade.extracted != row["pred"]
    ]
    assert len(stated) > 470 and len(differing) <= 0.01 * len(stated), differing


_HOSTILE = [
    "9^{9^{9^{9}}}", "9**9**9**9", "10^{10^{10}} + \\sqrt{2}", "2^{-10^{9}}", "1" * 100_000, "0." + "3" * 100_000,
    "1e9999", "10^{4500}", "1e999999999", "999999999!",
    "\\binom{10^9}{5 \\cdot 10^8}", "(" * 3000 + "1" + ")" * 3000, "[" * 3000,
    "\\frac{" * 3000, "\\sqrt{" * 1000 + "2" + "}" * 1000, "{" * 3000 + "}" * 3000, "\\frac{1}{0}",
    "x^{x^{x^{x^{x}}}}", "\\sum_{n=1}^{10^{12}} \\frac{1}{n^2}", "\\int_0^1 x^{x^{x}} dx", "1," * 20_000,
    "\\text{" * 500, "\u0660\u0661\u00b2\u2460", "\ud800", "\x00", "-" * 50_000 + "1", "\\pm" * 2000 + "1",
]  # fmt: skip
_REFERENCES = {"number": "18", "math": "3\\sqrt{13}", "choice": "B", "boolean": True, "jee": "ACD", "exact": "18",
               "literal": "[18]"}  # fmt: skip


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind == "math" else ()) for kind in _REFERENCES]
)
def test_hostile_answers_are_wrong_without_a_crash(kind: str) -> None:
    forms = ("\\boxed{%s}",) if kind == "math" else ("\\boxed{%s}", "The answer is %s.", "#### %s", "%s")
    items = [Item(form.replace("%s", text), _REFERENCES[kind]) for text in _HOSTILE for form in forms]
    with GraderPool(Rules(kind), time_limit_s=2) as pool:  # type: ignore[arg-type]
        found = pool.grade(items)
    assert not [item.output[:40] for item, grade in zip(items, found, strict=True) if grade.correct]
    allowed = {"different", "no answer", "time-out"} if kind == "math" else {"different", "no answer"}
    assert not [
        (item.output[:40], grade) for item, grade in zip(items, found, strict=True) if grade.reason not in allowed
    ]


def test_references_of_code_and_its_output_pass() -> None:
    found = grades(
        "exact",
        [Item(f"[ANSWER]{row['output']}[/ANSWER]", row["output"]) for row in rows("cruxeval")],
        Reading(pattern=r"(?s)\[ANSWER\](.*?)\[/ANSWER\]"),
    )
    assert len(found) == 800 and all(grade.correct for grade in found)


def test_letters_and_numbers_of_jeebench_are_right_in_a_box() -> None:
    golds = [row["gold"] for row in rows("jeebench")]
    found = grades("jee", [Item(f"Therefore $\\boxed{{\\text{{{gold}}}}}$.", gold) for gold in golds])
    assert [gold for gold, grade in zip(golds, found, strict=True) if not grade.correct] == []


def test_a_reference_is_readable_in_this_process_as_well() -> None:
    grader = Grader(Rules("math"))
    assert all(grader.reference(row["answer"]) for row in rows("aime24") + rows("hmmt_feb25"))
