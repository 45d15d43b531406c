"""The rules of `domain` on benchmarks whose domain is known: the figures of docs/curation.md.

The data are of others, see evaluation_data.py.
"""

import random
from typing import Any

import pytest
from evaluation_data import needs_data, rows

from megatron_tpt.corpus.annotate.rules import Domain, ReasoningIntensity, WordCounts
from megatron_tpt.corpus.documents import Document
from megatron_tpt.corpus.words import split_words

SCIENCES = ("physics", "chemistry", "biology", "anatomy", "astronomy", "medic", "genetic", "virology")


def is_science(row: dict[str, Any]) -> bool:
    return any(name in row["subject"] for name in SCIENCES)


@needs_data
@pytest.mark.parametrize(
    ("name", "columns", "subject", "domain", "percent"),
    [
        ("gsm8k_test", "question answer", "", "math", 98),
        ("gsm8k_test", "question", "", "math", 62),
        ("math500", "problem", "", "math", 89),
        ("olympiadbench_338", "question", "", "math", 97),
        ("humaneval", "prompt canonical_solution", "", "code", 94),
        ("mbpp_a", "text code", "", "code", 91),
        ("cruxeval", "code", "", "code", 99),
        ("web_documents_c4", "text", "", "general", 97),
        ("web_documents_dolma", "text", "", "general", 100),
        ("web_documents_wikipedia", "text", "", "general", 100),
        ("boolq_800", "passage", "", "general", 92),
        ("jeebench", "question", "phy", "science", 57),
        ("jeebench", "question", "chem", "science", 70),
        ("mmlu_test_570", "question choices", "sciences", "science", 52),
    ],
)
def test_the_share_of_a_benchmark_that_the_rules_call_by_its_domain(
    name: str, columns: str, subject: str, domain: str, percent: int
) -> None:
    own = [
        row
        for row in rows(name)
        if not subject or (is_science(row) if subject == "sciences" else row["subject"] == subject)
    ]
    texts = ["\n".join(str(row[column]) for column in columns.split()) for row in own]
    found = [one["domain"] for one in Domain().annotate([Document(text) for text in texts])]
    assert found.count(domain) / len(found) == pytest.approx(percent / 100, abs=0.02)


def test_think_tags_are_not_taken_for_code() -> None:
    document = Document("", "Who is it?", "<think>Hm.</think>It is me.", has_answer=True)
    assert Domain().annotate([document]) == [{"domain": "general"}]


def test_words_are_counted_as_they_are_split_in_every_script() -> None:
    texts = ["So it HOLDS, therefore: wait!", "因此 so 我们", "Zürich: hence", "?!", "so-so", "because ﬁrst"]
    cues = {b"so", b"therefore", b"wait", b"hence", b"because", b"first"}
    expected = [[word in cues for word in split_words(text)] for text in texts]
    found = ReasoningIntensity().annotate([Document(text) for text in texts])
    assert [one["reasoning_intensity"] for one in found] == [
        round(100 * sum(own) / max(len(own), 1), 2) for own in expected
    ]
    assert found[3]["reasoning_intensity"] == 0 < found[1]["reasoning_intensity"]


def test_words_that_share_beginnings_are_distinguished() -> None:
    kinds = ("sum equation equations concentration", "so thermodynamics if")
    known = " ".join(kinds).split()
    draw = random.Random(0)
    words = [*known, *(word.upper() for word in known), "Zürich", "因此so", "", "s", "x" * 20, "ﬁrst"]
    words += [part for word in known for part in (word[:-1], f"{word}s", word * 2, f"e{word}", f"{word}{'a' * 16}")]
    texts = ["", " ", *(draw.choice([" ", ", ", "\n"]).join(draw.choices(words, k=40)) for _ in range(50))]
    expected = []
    for text in texts:
        found = [word.decode() for word in split_words(text)]
        expected.append([*(sum(word in kind.split() for word in found) for kind in kinds), len(found)])
    assert WordCounts(*kinds).count(texts).tolist() == expected
    assert WordCounts(*kinds).count([]).tolist() == []


def test_annotations_are_the_same_whatever_documents_are_beside_one() -> None:
    texts = ["So <think>it</think>holds.", "Let x = 1, then \\frac{x}{2}.", "", "import so\nreturn self.x"]
    documents = [Document(f"{one}\n{other}", one, other, "Wait, so?", True) for one in texts for other in texts]
    documents += [Document(text) for text in texts]
    for annotator in (Domain(), ReasoningIntensity()):
        assert annotator.annotate(documents) == [annotator.annotate([one])[0] for one in documents]
        assert annotator.annotate([]) == []
