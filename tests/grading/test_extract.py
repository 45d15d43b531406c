"""One candidate is found in a text, at its end or, for base models, at its beginning."""

import time

import pytest

from megatron_tpt.grading import Reading, after_thinking, opens_thinking
from megatron_tpt.grading.extract import boxes, last_code_block, readable, statements
from megatron_tpt.grading.kinds import make_kind

LAST, FIRST = Reading(), Reading(first=True)


@pytest.mark.parametrize(
    ("output", "opened", "rest"),
    [
        ("<think>\n3 + 5 = 8\n</think>\n8", False, "\n8"),
        ("8", False, "8"),
        ("working\n</think>\n8", True, "\n8"),
        ("<think>a</think>4<think>b</think> 8 ", False, " 8 "),
        ("<think>\n3 + 5 = 8", False, None),
        ("<think>a</think>4<think>b", False, None),
        ("<think>a</think>The tag `<think>` opens it: 8", False, "The tag `<think>` opens it: 8"),
        ("The tag '<think>' opens it: 8", False, "The tag '<think>' opens it: 8"),
        ("3 + 5 = 8, so it is \\boxed{8}", True, None),  # the template opened it, the limit cut it
        ("a</think>4<think>b", True, None),
    ],
)
def test_the_answer_stands_after_the_thinking(output: str, opened: bool, rest: str | None) -> None:
    assert after_thinking(output, opened) == rest


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("What?<|assistant|><think>\n", True),
        ("What?<think>", True),
        ("What?<think>\n\n</think>\n\n", False),
        ("What does <think> mean?", False),
        ("", False),
    ],
)
def test_a_prompt_that_ends_in_thinking_is_known(prompt: str, opened: bool) -> None:
    assert opens_thinking(prompt) is opened


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("\\boxed{1}, no, \\boxed{\\frac{1}{2}}", ["1", "\\frac{1}{2}"]),
        ("\\fbox{\\{1, 2\\}}", ["\\{1, 2\\}"]),
        ("\\boxed {7}", ["7"]),
        ("\\boxed 5, or \\boxed{6} and \\fbox x.", ["5", "6", "x"]),
        ("Put it in \\boxed form", []),
        ("\\boxed{} and \\boxed{ }", []),
        ("\\boxed{5", []),
        ("\\boxed{3} then \\boxed{4", ["3"]),
        ("} \\boxed{3}", ["3"]),
        ("\\boxed{ \\boxed{\\frac{\\sqrt{2}}{2}} }", ["\\frac{\\sqrt{2}}{2}"]),
        ("\\boxed{x = \\boxed{5}}", ["5", "x = \\boxed{5}"]),
    ],
)
def test_boxes_are_balanced_and_not_empty(text: str, found: list[str]) -> None:
    assert boxes(text) == found


def test_what_is_stated_ends_with_its_sentence() -> None:
    assert statements("The answer is 3.5. Then 4.") == ["3.5"]
    assert statements("Final Answer: The final answer is $8$. I hope it is correct.")[-1] == "$8$"
    assert statements("**Answer:** $a. b$\nmore") == ["$a. b$"]


def test_a_pattern_picks_its_last_match_or_the_first() -> None:
    text = "Answer: 3. No. Answer: 4."
    assert readable(text, Reading(pattern=r"Answer: (\d)")) == "4"
    assert readable(text, Reading(first=True, pattern=r"Answer: (\d)")) == "3"
    assert readable(text, Reading(pattern=r"\d\.")) == "4."
    assert readable(text, Reading(pattern=r"x")) is None


def test_base_models_are_read_up_to_their_stop_texts() -> None:
    assert readable("4\nQuestion: 5\nA: 6", Reading(first=True, stop=("A:", "Question:"))) == "4\n"
    assert readable("4\nQuestion: 5", Reading(stop=("Question:",))) == "4\nQuestion: 5"


@pytest.mark.parametrize(
    ("text", "last", "first"),
    [
        ("The answer is 5.\n\nQ: 1+1?\nThe answer is 2.", "2", "5"),
        ("#### 3\n\nmore #### 4", "4", "3"),
        ("The answer is 5. #### 6", "6", "5"),
        ("We might say \\boxed{3}, but the final answer is $\\boxed{10}$.", "10", "10"),
        ("The answer is 4. Or better \\boxed{5}", "5", "4"),
        ("#### Step 2\nso \\boxed{7}", "7", "7"),
        ("#### 1) Setup\n3 + 4\n#### 2. Result\nThere are 7.", "7", "7"),
    ],
)
def test_the_last_answer_counts_and_of_base_models_the_first(text: str, last: str, first: str) -> None:
    assert make_kind("number").candidate(text, LAST) == last
    assert make_kind("number").candidate(text, FIRST) == first


@pytest.mark.parametrize(
    ("text", "candidate"),
    [
        ("So there are 144 ways in total.", "144"),
        ("The answer is 12 in total.", "12"),
        ("The answer is Navin.", "Navin"),
        ("The answer is 10 + x.", "10 + x"),
        ("The answer is either 12 or 13.", "either 12 or 13"),
        ("The answer is $3$ or $4$.", "$3$ or $4$"),
        ("Hence $x = 3\\sqrt{2}$.", "3\\sqrt{2}"),  # not 2
        ("total = 3√2.", "3√2"),
        ("\\boxed{63", None),
        ("no idea", None),
        ("", None),
    ],
)
def test_mathematics_is_taken_whole(text: str, candidate: str | None) -> None:
    assert make_kind("math").candidate(text, LAST) == candidate


def test_the_last_closed_code_block_is_the_code() -> None:
    text = "```python\na = 1\n```\ntext\n```\nb = 2\n```\nand ```\nc = 3"
    assert last_code_block(text) == "b = 2\n"
    assert last_code_block("```python\na = 1\n") is None
    assert last_code_block("```python\r\na = 1\r\nb = 2\r\n```\r\ntext\r\n") == "a = 1\nb = 2\n"
    assert last_code_block("````python\na = '''\n```\n'''\n````\n") == "a = '''\n```\n'''\n"
    assert last_code_block("~~~python\na = 1\n~~~") == "a = 1\n"
    assert last_code_block("~~~python\na = 1\n```") is None


@pytest.mark.parametrize(
    "text",
    ["1" * 100_000, "1 " * 30_000, "1,234" * 20_000, "- " * 50_000, "{" * 100_000, "\\boxed{" * 20_000, "$" * 50_000],
)
def test_degenerate_output_is_read_in_no_time(text: str) -> None:
    start = time.process_time()
    for name in ("number", "math", "choice", "boolean", "jee"):
        for reading in (LAST, FIRST):
            make_kind(name).candidate(text, reading)  # type: ignore[arg-type]
            make_kind(name).candidate("the answer is " + text, reading)  # type: ignore[arg-type]
    assert time.process_time() - start < 20
