"""The options of a multiple-choice problem: where a row has them, and how they are shown."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.benchmark import Benchmark
from megatron_tpt.evaluation.templates import number_or_text, unescaped, value_of
from megatron_tpt.grading import LETTERS


@dataclass(frozen=True)
class Choices:
    """The options of one problem, A first."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    """What the row calls them; empty where by letter, number or text."""
    column: str | None
    format: str
    separator: str
    order: tuple[int, ...] = ()
    """The number that each option has in the row, from 0; empty where they are in the row's order."""

    def rendered(self) -> str:
        """As a prompt shows them."""
        lines = (
            self.format.replace("{letter}", letter).replace("{choice}", text)
            for letter, text in zip(LETTERS, self.texts, strict=False)
        )
        return self.separator.join(lines)

    def placeholders(self) -> dict[str, str]:
        """What a template may call them: `{choices}`, and the name of their column."""
        return {name: self.rendered() for name in ("choices", self.column) if name is not None}

    def shuffled(self, source: random.Random) -> "Choices":
        """The same options in another order."""
        order = list(range(len(self.texts)))
        source.shuffle(order)
        labels = tuple(self.labels[i] for i in order) if self.labels else ()
        return replace(self, texts=tuple(self.texts[i] for i in order), labels=labels, order=tuple(order))

    def letter_of(self, answer: Any, where: str) -> Any:
        """The letter of the answer where the row names it by a label, or the order is ours; otherwise the answer."""
        if not self.labels and not self.order:
            return answer
        if not self.labels and isinstance(answer, int) and not isinstance(answer, bool):
            if answer not in self.order:
                raise UserError(f"{where}: the answer {answer} is no number of an option, 0 to {len(self.order) - 1}")
            return LETTERS[self.order.index(answer)]
        if not self.labels:
            if self.texts.count(str(answer)) != 1:
                raise UserError(
                    f"{where}: with --shuffle-choices the answer must be the text of one option, or its number from 0"
                )
            return LETTERS[self.texts.index(str(answer))]
        if str(answer) not in self.labels:
            raise UserError(f"{where}: the answer {str(answer)[:60]!r} is none of the labels {', '.join(self.labels)}")
        return LETTERS[self.labels.index(str(answer))]

    def check_answer(self, answer: Any, where: str) -> None:
        """Raise UserError for an answer as the row has it that is the letter of one option and the text of another."""
        if self.labels or self.order or not isinstance(answer, str):
            return
        letter = answer.strip().strip("().").upper()
        places = [i for i, text in enumerate(self.texts) if text.strip().casefold() == answer.strip().casefold()]
        own = [i for i in range(len(self.texts)) if LETTERS[i] == letter]
        if places and own and own[0] not in places:
            raise UserError(
                f"{where}: the answer {answer!r} is the letter of option {own[0] + 1} and the text of option "
                f"{places[0] + 1}; give its number from 0 (as a number, not a text), or name the options by "
                "--choice-labels"
            )


def read_choices(benchmark: Benchmark, row: Mapping[str, Any], where: str) -> Choices | None:
    """The options of the problem in `row`; None for a benchmark without any."""
    if benchmark.choices_column is not None:
        texts = _list(value_of(row, benchmark.choices_column, where), benchmark.choices_column, where)
    elif benchmark.choice_columns:
        texts = tuple(str(number_or_text(value_of(row, name, where), name, where)) for name in benchmark.choice_columns)
    elif benchmark.choice_texts:
        texts = tuple(benchmark.choice_texts)
    else:
        return None
    if benchmark.labels_column is not None:
        labels = _list(value_of(row, benchmark.labels_column, where), benchmark.labels_column, where)
    else:
        labels = tuple(benchmark.choice_labels)
    if labels and len(labels) != len(texts):
        raise UserError(f"{where}: {len(texts)} options, but {len(labels)} labels")
    return Choices(
        texts, labels, benchmark.choices_column, benchmark.choice_format, unescaped(benchmark.choice_separator)
    )


def _list(value: Any, name: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not 2 <= len(value) <= len(LETTERS):
        raise UserError(f"{where}: column {name!r} is not a list of 2 to {len(LETTERS)} options")
    return tuple(str(number_or_text(item, name, where)) for item in value)


def continuations(benchmark: Benchmark, prompt: str, choices: Sequence[str]) -> list[tuple[str, str]]:
    """(context, continuation) of every option, whose likelihoods are compared."""
    if benchmark.likelihood_of == "choice":
        return [(prompt, f" {choice}") for choice in choices]
    if benchmark.likelihood_of == "letter":
        return [(prompt, f" {letter}") for letter, _ in zip(LETTERS, choices, strict=False)]
    before, _, rest = prompt.rpartition(benchmark.blank)
    return [(before + choice, f" {rest.strip()}") for choice in choices]
