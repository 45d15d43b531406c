"""Conditions on the `meta` of records, as `tools/index.py --where` and the strata of `tools/curate.py` take them.

    where = Where("answer_tokens > 4096 and domain in ['math', 'code'] and not 'alf' in strata")
    where.matches({"answer_tokens": 5000, "domain": "math"})       # True

Names are fields of `meta`, `a.b` the field b of the object a. There are texts, numbers, true, false, null, lists, the
comparisons == != < <= > >=, `in` (also of a part in a text), `is null`, and, or, not, and brackets. A field that a
record lacks is null: it equals null alone, is in nothing, has nothing in it, and is neither less nor greater than
anything; nor are values of different kinds. The text is parsed as Python writes conditions, every other construct is
refused, and nothing of it is ever executed. `Where.notes` says what of a condition is probably a mistake, by the
records that it was asked about.
"""

import ast
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.records.parsing import kind_of

_MAX_CHARACTERS = 4096
"""A bound for the depth of the parser's recursion too."""
_WORDS = {"true": True, "false": False, "null": None}

type _Value = Callable[[Mapping[str, Any]], Any]


class Where:
    """A condition. It can be pickled, and used by several threads."""

    def __init__(self, text: str) -> None:
        """Raises UserError, with the place, for what is no condition."""
        self.text = text
        compiler = _Compiler(text)
        try:
            self._holds = compiler.truth(_parse(text))
        except RecursionError:
            raise UserError(f"{text[:60]!r}... is nested too deeply: write it with fewer brackets") from None
        self.fields = sorted(compiler.fields)
        """The fields of `meta` that it reads."""
        self.unseen = set(self.fields)
        """Those that no record has had so far."""
        self.mismatches = compiler.mismatches
        """Comparisons that did not hold of some record as its value is of another kind, and which kinds."""

    def __reduce__(self) -> tuple[type["Where"], tuple[str]]:
        return Where, (self.text,)

    def matches(self, meta: Mapping[str, Any]) -> bool:
        """Whether the condition holds of a record."""
        if self.unseen:
            found = {name for name in self.unseen if _field(meta, name.split(".")) is not None}
            self.unseen = self.unseen - found  # not in place: other threads iterate over it
        return bool(self._holds(meta))

    def notes(self) -> Iterator[str]:
        """A line for what is probably a mistake."""
        if self.unseen:
            yield f"no record has {', '.join(sorted(self.unseen))} in its meta"
        for comparison, kinds in self.mismatches.items():
            yield f"{comparison} compares {kinds} in some records, and does not hold of them"


def _parse(text: str) -> ast.expr:
    if len(text) > _MAX_CHARACTERS:
        raise UserError(f"a condition of {len(text):,} characters: at most {_MAX_CHARACTERS:,} are read")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        place = f" at character {error.offset}" if isinstance(error, SyntaxError) and error.offset else ""
        raise UserError(
            f"{text!r} is no condition{place}: write one such as answer_tokens > 4096 and domain == 'math'"
        ) from None


def _path(node: ast.expr) -> tuple[str, ...]:
    """The names in a.b.c; nothing for any other expression."""
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Attribute) and (before := _path(node.value)):
        return (*before, node.attr)
    return ()


def _field(meta: Mapping[str, Any], path: list[str]) -> Any:
    value: Any = meta
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


class _Compiler:
    """Makes functions of the parts of a condition."""

    def __init__(self, text: str) -> None:
        self._text = text
        self.fields: set[str] = set()
        self.mismatches: dict[str, str] = {}

    def truth(self, node: ast.expr) -> _Value:
        """What computes `node` where a condition is needed. A text, number or list there would always hold."""
        bare = node.operand if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) else node
        is_literal = isinstance(bare, ast.Constant) and not isinstance(bare.value, bool | None)
        if is_literal or isinstance(bare, ast.List | ast.Tuple):
            raise UserError(
                f"{self._text!r}: {self._source(node)} alone is no condition: compare it with a field, as in "
                "domain == 'math' or domain == 'code'"
            )
        return self.value(node)

    def value(self, node: ast.expr) -> _Value:
        """What computes `node` for a record."""
        match node:
            case ast.BoolOp(op, parts):
                terms = [self.truth(part) for part in parts]
                every = isinstance(op, ast.And)
                return lambda meta: (all if every else any)(term(meta) for term in terms)
            case ast.UnaryOp(ast.Not(), operand):
                inner = self.truth(operand)
                return lambda meta: not inner(meta)
            case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as number)) if not isinstance(number, bool):
                return lambda meta: -number
            case ast.Constant(None | bool() | int() | float() | str() as constant):
                return lambda meta: constant
            case ast.List(items) | ast.Tuple(items):
                members = [self.value(item) for item in items]
                return lambda meta: [member(meta) for member in members]
            case ast.Compare():
                return self._compare(node)
            case ast.Name(name) if name in _WORDS:
                return lambda meta: _WORDS[name]
            case ast.Name() | ast.Attribute() if path := list(_path(node)):
                self.fields.add(".".join(path))
                return (lambda meta: meta.get(path[0])) if len(path) == 1 else (lambda meta: _field(meta, path))
        raise UserError(
            f"{self._text!r}: {self._source(node)!r} cannot be part of a condition: there are fields of meta, texts, "
            "numbers, lists, comparisons, in, and, or, not"
        )

    def _source(self, node: ast.expr) -> str:
        return ast.get_source_segment(self._text.strip(), node) or type(node).__name__

    def _compare(self, node: ast.Compare) -> _Value:
        source, values = self._source(node), [self.value(part) for part in (node.left, *node.comparators)]
        pairs = [
            self._pair(self._test(one), left, right, source if isinstance(one, _OF_ONE_KIND) else None)
            for one, (left, right) in zip(node.ops, itertools.pairwise(values), strict=True)
        ]
        return pairs[0] if len(pairs) == 1 else lambda meta: all(pair(meta) for pair in pairs)

    def _pair(self, test: Callable[[Any, Any], bool], left: _Value, right: _Value, source: str | None) -> _Value:
        """Compares two values; where they are not of one kind, notes so under the name `source`."""

        def holds(meta: Mapping[str, Any]) -> bool:
            a, b = left(meta), right(meta)
            if test(a, b):
                return True
            if source is not None and type(a) is not type(b) and _differ_in_kind(a, b):
                self.mismatches.setdefault(source, f"{kind_of(a)} with {kind_of(b)}")
            return False

        return holds

    def _test(self, node: ast.cmpop) -> Callable[[Any, Any], bool]:
        match node:
            case ast.Eq() | ast.Is():
                return _equal
            case ast.NotEq() | ast.IsNot():
                return lambda a, b: not _equal(a, b)
            case ast.In():
                return _is_in
            case ast.NotIn():
                return lambda a, b: not _is_in(a, b)
        return _ordered(_ORDERS[type(node)])


def _equal(a: Any, b: Any) -> bool:
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _is_in(item: Any, container: Any) -> bool:
    if isinstance(container, str):
        return isinstance(item, str) and item in container
    if isinstance(container, Mapping):
        return isinstance(item, str) and item in container
    if isinstance(item, str) and isinstance(container, list):  # which equals texts alone
        return item in container
    return isinstance(container, list) and item is not None and any(_equal(item, one) for one in container)


_ORDERS: dict[type, Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge
}  # fmt: skip


_NUMBERS = (int, float)
_OF_ONE_KIND = (ast.Eq, *_ORDERS)
"""Comparisons that are probably a mistake where the values are never of the same kind."""


def _differ_in_kind(a: Any, b: Any) -> bool:
    return a is not None and b is not None and kind_of(a) != kind_of(b)


def _ordered(order: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    def holds(a: Any, b: Any) -> bool:
        are_numbers = type(a) in _NUMBERS and type(b) in _NUMBERS  # not Booleans
        return (are_numbers or (isinstance(a, str) and isinstance(b, str))) and order(a, b)

    return holds
