"""Annotations by a language model: it answers a prompt about each document, and a label or a number is read from that.

A judge is a YAML file: `prompt` with {text}, or {question} and {answer}, and `labels`, or `minimum` and `maximum`.
What it answers is read from the end: the last of the labels, or the last number, in the answer behind its thinking.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tpt.config.convert import from_yaml
from megatron_tpt.config.fields import PositiveInt, check_bounds
from megatron_tpt.config.yaml_file import load_yaml
from megatron_tpt.corpus.documents import Document
from megatron_tpt.errors import UserError, require
from megatron_tpt.generation import Completion, Engine, Failure, Request, Sampling
from megatron_tpt.think_tags import CLOSE_TAG

DEFINITIONS = Path(__file__).parents[1] / "definitions" / "judges"
_PLACES = ("text", "question", "answer")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
UNANSWERED, FAILED = "unanswered", "failed"


@dataclass(frozen=True)
class Judge:
    """What to ask about a document, and what answers there are."""

    prompt: str
    """The prompt with {text}, {question} or {answer} where these go."""
    labels: list[str] = field(default_factory=list)
    """The possible answers; case makes no difference."""
    minimum: float | None = None
    """Of an answer that is a number: the least; others count as none."""
    maximum: float | None = None
    """And the greatest."""
    max_characters: PositiveInt = 6000
    """What is put into the prompt of each part: its beginning."""
    max_new_tokens: PositiveInt = 512
    """Longest answer with its thinking."""

    def __post_init__(self) -> None:
        check_bounds(self)
        ends = [one for one in (self.minimum, self.maximum) if one is not None]
        require(len(ends) == (0 if self.labels else 2), "a judge needs either labels, or minimum and maximum")
        require(ends == sorted(ends), f"minimum {self.minimum} is above maximum {self.maximum}: exchange them")
        names = [label.strip().lower() for label in self.labels]
        require(all(names), "labels: one is empty: give it a name")
        require(
            len(set(names)) == len(names), "labels: two differ in case alone, which makes no difference: remove one"
        )
        used = set(re.findall(r"{(\w+)}", self.prompt))
        require(
            bool(used) and used <= set(_PLACES),
            f"prompt: write {{text}}, or {{question}} and {{answer}}, where these go; found {sorted(used) or 'none'}",
        )

    @classmethod
    def read(cls, path: str) -> "Judge":
        """The judge of a file, or one of the package by its name. Raises UserError with all mistakes."""
        known = sorted(file.stem for file in DEFINITIONS.glob("*.yaml"))
        file = DEFINITIONS / f"{path}.yaml" if path in known else Path(path)
        try:
            content, places = load_yaml(file)
        except OSError as error:
            raise UserError(
                f"--judge {path}: {error.strerror}: give a YAML file, or one of {', '.join(known)}"
            ) from None
        return from_yaml(cls, content, places, file)

    def prompt_for(self, document: Document) -> str:
        """The prompt about a document. Text in it is never taken for a place."""
        parts = {
            "text": document.text,
            "question": document.question or document.text,
            "answer": document.answer or document.text,
        }
        return re.sub(r"{(text|question|answer)}", lambda found: parts[found[1]][: self.max_characters], self.prompt)

    def read_answer(self, completion: str) -> str | float | None:
        """What a model answered; None where that is none of the possible answers."""
        text = completion.rpartition(CLOSE_TAG)[2]
        if not self.labels:
            assert self.minimum is not None and self.maximum is not None
            numbers = _NUMBER.findall(text)
            value = float(numbers[-1]) if numbers else None
            return value if value is not None and self.minimum <= value <= self.maximum else None
        any_label = "|".join(re.escape(label) for label in sorted(self.labels, key=len, reverse=True))
        found = re.findall(rf"(?<!\w)(?:{any_label})(?!\w)", text, re.IGNORECASE)
        return next((label for label in self.labels if found and label.lower() == found[-1].lower()), None)


def requests_of(
    judges: dict[str, Judge], documents: Iterable[tuple[Any, Document]], has_chat: bool
) -> Iterator[Request]:
    """The requests about documents, each with a key (key of the document, name of the judge): messages for a model that
    `has_chat`, else text. Temperature 0."""
    for key, document in documents:
        for name, judge in judges.items():
            text = judge.prompt_for(document)
            prompt = [{"role": "user", "content": text}] if has_chat else text
            yield Request(prompt, Sampling(0.0, 1.0, judge.max_new_tokens), (key, name))


def judged(
    engine: Engine, judges: dict[str, Judge], requests: Iterable[Request]
) -> Iterator[tuple[Any, str, str | float | None, str | None]]:
    """For each request, as it finishes: key of the document, name of the judge, what it answered, and why there is no
    answer."""
    for request, outcome in engine.generate(requests):
        key, name = request.key
        if isinstance(outcome, Failure):
            yield key, name, None, f"{FAILED}: {outcome.reason}"
            continue
        assert isinstance(outcome, Completion)
        value = judges[name].read_answer(outcome.text)
        yield key, name, value, UNANSWERED if value is None else None
