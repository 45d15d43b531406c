"""What steps cost: tokens, FLOPs and hours, planned and measured.

A training program of this package says its tokens and FLOPs itself, by its recipe before it runs and by its run folder
afterwards; tools/augment.py its tokens once it has run. Of another step the study says it, with arithmetic: `{tokens:
"{data.documents} * 32", flops: 2 * 1.1e5 * tokens}`.
"""

import ast
import math
import operator
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tpt.config.load import load_recipe
from megatron_tpt.errors import UserError
from megatron_tpt.models.sizes import model_flops_per_token
from megatron_tpt.studies.expand import Graph, Node, Wanted
from megatron_tpt.studies.folders import done_record
from megatron_tpt.studies.measured import training_of
from megatron_tpt.studies.study import Budget, ResultBudget

_OPERATIONS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Pow: math.pow, ast.USub: operator.neg,
}  # fmt: skip


@dataclass(frozen=True)
class Spent:
    """The cost of a step, or of several; None where it is not known."""

    tokens: float | None = 0.0
    """Trained on."""
    generated: float | None = 0.0
    """Tokens generated."""
    flops: float | None = 0.0
    hours: float | None = 0.0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(*(_sum(one, two) for one, two in zip(self.values(), other.values(), strict=True)))

    def times(self, share: float) -> "Spent":
        """A part of it."""
        return Spent(*(None if value is None else share * value for value in self.values()))

    def values(self) -> tuple[float | None, ...]:
        """In the order of the fields."""
        return self.tokens, self.generated, self.flops, self.hours

    @property
    def all_tokens(self) -> float | None:
        """Trained on and generated."""
        return _sum(self.tokens, self.generated)


def _sum(one: float | None, two: float | None) -> float | None:
    return None if one is None or two is None else one + two


def calculate(text: str, **names: float | None) -> float:
    """The value of arithmetic: numbers, + - * / **, brackets, and `names`. Raises UserError for anything else."""

    def value(node: ast.AST) -> float:
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return float(number)
            case ast.Name(id=name) if names.get(name) is not None:
                return float(names[name])  # type: ignore[arg-type]
            case ast.BinOp(left, operation, right) if type(operation) in _OPERATIONS:
                return _OPERATIONS[type(operation)](value(left), value(right))
            case ast.UnaryOp(operation, operand) if type(operation) in _OPERATIONS:
                return _OPERATIONS[type(operation)](value(operand))
        raise ValueError("numbers, + - * / ** and brackets only")

    try:
        result = value(ast.parse(text.strip(), mode="eval").body)
        if not math.isfinite(result):
            raise ValueError("it is not finite")
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else error
        known = f"; known names are {', '.join(names)}" if names else ""
        raise UserError(f"{text!r} cannot be calculated ({reason}){known}") from None
    return result


def costs(graph: Graph) -> dict[str, Spent]:
    """The cost of every node by key: measured where it has succeeded, planned elsewhere."""
    records = {key: done_record(node) for key, node in graph.nodes.items()}
    found = {}
    for key, node in graph.nodes.items():
        try:
            found[key] = _cost(node, records[key])
        except UserError as error:
            raise UserError(f"steps.{node.step}.cost: {error}") from None
    finished: dict[str, list[Spent]] = {}
    for key, node in graph.nodes.items():
        if records[key]:
            finished.setdefault(node.step, []).append(found[key])
    return {key: _with_hours(spent, finished.get(graph.nodes[key].step, [])) for key, spent in found.items()}


def _cost(node: Node, record: Mapping[str, Any]) -> Spent:
    said = node.cost
    tokens, flops, prompt_tokens = (record.get(name) for name in ("tokens", "flops", "prompt_tokens"))
    if tokens is None and "tokens" in said:
        tokens = calculate(said["tokens"])
    if prompt_tokens is None and "prompt_tokens" in said:
        prompt_tokens = calculate(said["prompt_tokens"], tokens=tokens)
    generated = record.get("generated_tokens", 0.0)
    if not record and (tokens is None or flops is None):
        planned = _of_recipe(node.command())
        tokens, flops = (planned.tokens if tokens is None else tokens), (planned.flops if flops is None else flops)
        generated = planned.generated
    if "flops" in said and (flops is None or not record):
        flops = calculate(said["flops"], tokens=tokens, prompt_tokens=prompt_tokens)
    hours = record.get("hours")
    if hours is None and "hours" in said:
        hours = calculate(said["hours"], tokens=tokens, prompt_tokens=prompt_tokens)
    if any(value is not None and value < 0 for value in (tokens, flops, hours)):
        raise UserError("tokens, FLOPs or hours are negative: correct it")
    is_generated = record.get("generated", False) or (node.config.cost is not None and node.config.cost.generated)
    if training_of(node.command()) is None:  # a step of which nothing is said costs hours alone
        tokens = tokens or 0.0
        flops = None if flops is None and record.get("generated") else flops or 0.0
    return Spent(0.0, tokens, flops, hours) if is_generated else Spent(tokens, generated, flops, hours)


def _with_hours(spent: Spent, finished: Sequence[Spent]) -> Spent:
    """With the hours that finished runs of the step let expect: as many per FLOP, or as many."""
    if spent.hours is not None or not finished:
        return spent
    rates = [one.hours / one.flops for one in finished if one.hours is not None and one.flops]
    hours = statistics.fmean(one.hours for one in finished if one.hours is not None)
    if spent.flops and rates:
        hours = statistics.fmean(rates) * spent.flops
    return Spent(spent.tokens, spent.generated, spent.flops, hours)


def total(spents: Iterable[Spent]) -> Spent:
    """The sum."""
    return sum(spents, Spent())


def cost_of_result(wanted: Wanted, found: Mapping[str, Spent]) -> Spent:
    """What a result took: its part of its step, and all steps that it needs, generation included, each once."""
    shares = {step: calculate(text) for step, text in wanted.shares.items()}
    own = found[wanted.node.key].times(1 / max(len(wanted.node.rows_of), 1))
    return total([own, *(found[node.key].times(shares.get(node.step, 1.0)) for node in wanted.ancestors())])


def longest_chain(graph: Graph, found: Mapping[str, Spent]) -> float | None:
    """Hours of the study if everything that can runs at once."""
    ends: dict[str, float | None] = {}
    for key, node in graph.nodes.items():
        before = [ends[each] for each in node.before]
        start = None if None in before else max((one for one in before if one is not None), default=0.0)
        ends[key] = _sum(start, found[key].hours)
    return None if None in ends.values() else max(one for one in ends.values() if one is not None)


def check_budget(graph: Graph, budget: Budget, found: Mapping[str, Spent]) -> None:
    """Raise UserError where the study costs more than its budget, or a result not what all should cost."""
    whole = total(found.values())
    for name, limit, spent in (
        ("tokens", budget.tokens, whole.all_tokens), ("flops", budget.flops, whole.flops),
        ("hours", budget.hours, whole.hours),
    ):  # fmt: skip
        if limit is not None and _require_known(f"budget.{name}", spent) > limit:
            raise UserError(
                f"budget.{name}: {limit:.4g}, and the study takes {spent:.4g}: raise it, or shrink the study"
            )
    owns = [(wanted, cost_of_result(wanted, found)) for wanted in graph.results]
    for number, each in enumerate(budget.results):
        meant = [
            (wanted, own) for wanted, own in owns
            if all(wanted.levels.get(factor) in levels for factor, levels in each.only.items())
        ]  # fmt: skip
        if not meant:
            raise UserError(f"budget.results.{number}: no result has these levels: correct `only`")
        for wanted, own in meant:
            _check_result(f"budget.results.{number}", each, own, ", ".join(wanted.levels.values()))


def _check_result(where: str, due: ResultBudget, own: Spent, name: str) -> None:
    for what, limit, spent in (
        ("trained_tokens", due.trained_tokens, own.tokens), ("tokens", due.tokens, own.all_tokens),
        ("flops", due.flops, own.flops),
    ):  # fmt: skip
        if limit is not None and abs(_require_known(f"{where}.{what}", spent) / limit - 1) > due.tolerance:
            raise UserError(
                f"{where}.{what}: {limit:.4g}, and {name} takes {spent:.4g} with all steps before it: change its "
                f"steps, or raise the tolerance ({due.tolerance:.2g})"
            )


def _require_known(where: str, spent: float | None) -> float:
    if spent is None:
        raise UserError(f"{where}: the cost of a step is not known, see --dry-run: give its `cost`")
    return spent


def refused_recipes(graph: Graph) -> dict[str, str]:
    """Name of a training step that has not run: why its recipe gives no cost. Mostly it would fail for that reason."""
    found = {}
    for node in graph.nodes.values():
        if not done_record(node):
            try:
                _recipe_of(node.command())
            except UserError as error:
                found[node.name] = str(error)
    return found


def _recipe_of(command: Sequence[str]) -> Any:
    """The recipe of a training program; None of another. Raises UserError for one that the program would refuse, but
    the checkpoint to start from need not be there yet."""
    if (training := training_of(command)) is None:
        return None
    kind, words = training
    start = next((word for word in words if word.startswith("--training.init_from=")), "")
    if not Path(start.partition("=")[2]).exists():
        words = [word for word in words if word != start]
    recipe, _ = load_recipe(kind, words)
    return recipe


def _of_recipe(command: Sequence[str]) -> Spent:
    """Tokens and FLOPs of a training program that has not run; None for what is not known before its data is there."""
    try:
        recipe = _recipe_of(command)
    except UserError:  # a dry run says it, and the program
        recipe = None
    if recipe is None:
        return Spent(None, 0.0, None)
    tokens = recipe.training.num_samples(recipe.training.num_steps) * recipe.training.sequence_length
    generated = recipe.most_generated_tokens
    if recipe.model.vocab_size is None:
        return Spent(tokens, generated, None)
    passes = recipe.model.expected_passes(recipe.training.num_steps)
    flops = model_flops_per_token(recipe.model, recipe.training.sequence_length, passes)
    return Spent(tokens, generated, (tokens + generated / 3) * flops)
