"""From a study to its graph: every step with every combination of levels that it needs, each with its key.

A step depends on the factors that its command and the steps before it mention, and on no others: what is the same for
two arms is one node of the graph. A node's key is made of its command (with the names of levels replaced by what they
hold, and paths of other steps by their keys), the content of the files that it names, its version, and the keys of the
steps before it; beside it stands the version of its code (code_version.py). Both are in the name of its folder:

    OUTPUT/STEP/LEVELS-KEY-CODE/      see step.py for what is in it
"""

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.files import file_fingerprint
from megatron_tpt.studies.code_version import code_of, programs
from megatron_tpt.studies.study import NAME, StepConfig, StudyConfig, levels_of

Levels = Mapping[str, str]
"""Factor: name of the level."""

_PLACEHOLDER = re.compile(rf"\{{\{{({NAME}(?:\.[\w-]+)*)\}}\}}|\{{({NAME}(?:\.[\w-]+)*)\}}")
_FOLDER_BLOCKS = 1024
"""The most blocks of 64 KiB that the fingerprint of a folder reads, but at least two of every file."""
_MOST_NODES = 100_000
_MOST_COMBINATIONS = 1_000_000
_MOST_NESTED = 20
_LABEL = 60
"""Characters of the levels in the name of a folder."""


@dataclass
class Node:
    """A step with a combination of levels."""

    step: str
    config: StepConfig
    levels: dict[str, str]
    """Of the factors that it depends on; those that it takes all levels of are not among them."""
    words: list[str]
    """Its arguments of python; "\\0output\\0" and "\\0KEY\\0" stand for folders."""
    before: dict[str, "Node"]
    """The nodes whose output it reads, by key."""
    key: str
    inputs: dict[str, str]
    """Path: fingerprint."""
    code: dict[str, str]
    """Path: digest, of what it runs."""
    cost: dict[str, str] = field(default_factory=dict)
    """What the study says of its cost: arithmetic without placeholders, see costs.py."""
    rows_of: list[list[dict[str, str]]] = field(default_factory=list)
    """With `over`: the levels of the combinations that each of its words is of, in their order; those of the same words
    are one."""
    before_rows: list[list["Node"]] = field(default_factory=list)
    """With `over`: the nodes whose output it reads for each of them."""
    folder: Path = Path()
    """Where its files are, see folders.py."""
    code_key: str = ""
    """The digest of its code and of that of the nodes before it, as they ran or will run."""

    @property
    def name(self) -> str:
        """As people read it: "train plain, 0"."""
        return f"{self.step} {', '.join(self.levels.values())}".strip()

    @property
    def output(self) -> Path:
        """What {output} stands for."""
        return self.folder / "output"

    def command(self) -> list[str]:
        """Its arguments of python, with the paths of folders."""
        paths = {"output": str(self.output)} | {key: str(node.output) for key, node in self.before.items()}
        return [re.sub("\0(\\w+)\0", lambda found: paths[found[1]], word) for word in self.words]

    def ancestors(self) -> dict[str, "Node"]:
        """It and all nodes before it, by key."""
        found: dict[str, Node] = {}
        waiting = [self]
        while waiting:
            node = waiting.pop()
            if node.key not in found:
                found[node.key] = node
                waiting += node.before.values()
        return found


@dataclass(frozen=True)
class Wanted:
    """The results of a node for one combination of the levels of its factors, and of those that it is `over`."""

    node: Node
    levels: dict[str, str]
    before: list[Node]
    """The nodes that they need, and no others of a node that is `over` several combinations."""
    shares: dict[str, str]
    """Step: the part of its cost that they take, as arithmetic."""

    def ancestors(self) -> list[Node]:
        """All nodes that they need, but their own, each once."""
        return list({key: one for node in self.before for key, one in node.ancestors().items()}.values())


@dataclass
class Graph:
    """What a study runs."""

    nodes: dict[str, Node]
    """By key; each stands behind those that it needs."""
    results: list[Wanted]


def expand(config: StudyConfig, recorded: Mapping[str, str] | None = None) -> Graph:
    """The graph of a study. Raises UserError for placeholders without meaning and steps that need each other.

    `recorded`, fingerprints of inputs by path, stand for those of the files; nodes then have no code, too.
    """
    return _Expansion(config, recorded).graph()


def combinations(config: StudyConfig, factors: Sequence[str], others: Levels | None = None) -> Iterator[dict[str, str]]:
    """All combinations of the levels of these factors that are not excluded, each with the levels of the others."""
    for levels in itertools.product(*(levels_of(config, name) for name in factors)):
        combination = {**(others or {}), **dict(zip(factors, levels, strict=True))}
        if not any(excluded.items() <= combination.items() for excluded in config.exclude if excluded):
            yield combination


def _mentioned(value: Any) -> set[str]:
    """The names in braces in nested lists and mappings."""
    if isinstance(value, dict | list):
        return set[str]().union(*map(_mentioned, value.values() if isinstance(value, dict) else value))
    return {found[2].partition(".")[0] for found in _PLACEHOLDER.finditer(str(value)) if found[2]}


class _Text:
    """Replaces placeholders, and notes what they were; `where` is for messages."""

    def __init__(self, expansion: "_Expansion", where: str, levels: Levels) -> None:
        self.expansion, self.where, self.levels = expansion, where, levels
        self.factors: dict[str, None] = {}
        self.nodes: dict[str, Node] = {}

    def words(self, word: str, depth: int = 0) -> list[str]:
        """The words that one stands for: several where it is a placeholder of a list."""
        whole = _PLACEHOLDER.fullmatch(word)
        if whole is None or whole[1] or depth > _MOST_NESTED:
            return [self.text(word, depth)]
        value = self._value(whole[2])
        if isinstance(value, _Marked):
            return [value]
        items = value if isinstance(value, list) else [value]
        return [text for item in items for text in self.words(self._as_text(item, whole[2]), depth + 1)]

    def text(self, word: str, depth: int = 0) -> str:
        """A word with its placeholders replaced."""
        if depth > _MOST_NESTED:
            raise UserError(f"{self.where}: {word}: its placeholders lead back to themselves; correct the levels")

        def replace(found: re.Match[str]) -> str:
            if found[1]:
                return f"{{{found[1]}}}"
            value = self._value(found[2])
            return value if isinstance(value, _Marked) else self.text(self._as_text(value, found[2]), depth + 1)

        return _PLACEHOLDER.sub(replace, word)

    def _value(self, name: str) -> Any:
        config, (first, *keys) = self.expansion.config, name.split(".")
        if first == "output" and not keys:
            return _Marked("\0output\0")
        if first in config.steps and not keys:
            node, factors = self.expansion.node(first, self.levels)
            self.nodes[node.key] = node
            self.factors |= dict.fromkeys(factors)
            return _Marked(f"\0{node.key}\0")
        if first not in config.factors:
            known = ", ".join([*config.factors, *config.steps, "output"])
            raise UserError(
                f"{self.where}: {{{name}}} means nothing; known are {known}; write {{{{{name}}}}} for the text itself"
            )
        self.factors[first] = None
        if not keys:
            return self.levels[first]
        value = levels_of(config, first)[self.levels[first]]
        for key in keys:
            if not isinstance(value, dict) or key not in value:
                raise UserError(
                    f"{self.where}: {{{name}}}: the level {self.levels[first]} of {first} holds no {key}; add it"
                )
            value = value[key]
        return value

    def _as_text(self, value: Any, name: str) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if not isinstance(value, str | int | float):
            raise UserError(
                f"{self.where}: {{{name}}}: {value} is neither a text nor a number, nor a list of these in a word of "
                f"its own"
            )
        return str(value)


class _Marked(str):
    """A text in which nothing is replaced."""


class _Expansion:
    def __init__(self, config: StudyConfig, recorded: Mapping[str, str] | None) -> None:
        self.config, self.has_code = config, recorded is None
        self.nodes: dict[str, Node] = {}
        self._known: dict[tuple[str, tuple[str, ...]], tuple[Node, list[str]]] = {}
        self._open: list[str] = []
        self._fingerprints = dict(recorded or {})
        self._code: dict[tuple[str, ...], dict[str, str]] = {}

    def graph(self) -> Graph:
        """The steps with results, those that no other step mentions, and everything that these need."""
        steps, factors = self.config.steps, list(self.config.factors)
        if math.prod(len(levels_of(self.config, name)) for name in factors) > _MOST_COMBINATIONS:
            raise UserError(f"factors: more than {_MOST_COMBINATIONS:,} combinations: give fewer factors or levels")
        if next(combinations(self.config, factors), None) is None:
            raise UserError("exclude: no combination of levels is left; remove one")
        mentioned = _mentioned([self.config.factors, [step.command for step in steps.values()]])
        wanted = {name: step for name, step in steps.items() if step.results is not None or name not in mentioned}
        used = mentioned.union(*([*step.over, *step.only] for step in steps.values()))
        used |= _mentioned([asdict(step.cost) for step in steps.values() if step.cost])
        for name in factors:
            if name not in used and len(levels_of(self.config, name)) > 1:
                raise UserError(f"factors.{name}: no step mentions it: its levels would have the same results; remove "
                                f"it, or write {{{name}}} where it has an effect")  # fmt: skip
        results: dict[str, Wanted] = {}
        for levels in combinations(self.config, factors):
            for name, step in wanted.items():
                if all(levels[factor] in names for factor, names in step.only.items()):
                    node, own_factors = self.node(name, levels)
                    if step.results is not None:
                        # Levels of other factors would repeat the same figures, as if they were others.
                        own = {factor: levels[factor] for factor in factors if factor in (*own_factors, *step.over)}
                        results.setdefault(json.dumps([node.key, own]), self._wanted(node, own, levels))
        for name, step in steps.items():
            if not any(node.step == name for node in self.nodes.values()):
                self.node(name, next(combinations(self.config, factors), {}))  # which says so if it needs itself
                raise UserError(f"steps.{name}: no combination of levels runs it; remove it, or what excludes it")
            if shares := set(step.results.shares if step.results else ()):
                before = {node.step for one in results.values() if one.node.step == name for node in one.ancestors()}
                if unused := sorted(shares - before):
                    raise UserError(f"steps.{name}.results.shares: {unused[0]} is no step before it; remove it")
        return Graph(self.nodes, list(results.values()))

    def _wanted(self, node: Node, own: dict[str, str], levels: Levels) -> Wanted:
        results, over = node.config.results, node.config.over
        assert results is not None
        text = _Text(self, f"steps.{node.step}.results.shares", levels)
        shares = {step: text.text(str(share)) for step, share in results.shares.items()}
        before = list(node.before.values())
        if over:
            own_row = {factor: levels[factor] for factor in over}
            before = next(row for row, of in zip(node.before_rows, node.rows_of, strict=True) if own_row in of)
        return Wanted(node, own, before, shares)

    def node(self, step: str, levels: Levels) -> tuple[Node, list[str]]:
        """The node of a step with a combination of the levels of all factors, and the factors that it depends on."""
        known = step, tuple(levels.values())
        if known not in self._known:
            if step in self._open:
                raise UserError(f"steps.{step}: needs its own output ({' -> '.join([*self._open, step])})")
            self._open.append(step)
            node = self._make(step, levels)
            self._open.pop()
            # The same work for other levels is the same node.
            self._known[known] = self.nodes.setdefault(node.key, node), list(node.levels)
            if len(self.nodes) > _MOST_NODES:
                raise UserError(f"more than {_MOST_NODES:,} steps with their levels: give fewer factors or levels")
        return self._known[known]

    def _make(self, step: str, levels: Levels) -> Node:
        config, where = self.config.steps[step], f"steps.{step}"
        text = _Text(self, where, levels)
        every: list[_Text] = []
        if config.over:
            every = [_Text(self, where, one) for one in combinations(self.config, config.over, levels)]
        words, rows = _words(config, text, every)
        before_rows = [list(row[0].nodes.values()) for row in rows]
        for one in (text, *every):
            text.factors |= one.factors
            text.nodes |= one.nodes
        inputs = self._inputs(where, words, [text.text(path) for path in config.inputs])
        own = {name: levels[name] for name in self.config.factors if name in text.factors and name not in config.over}
        content = {"step": step, "words": words, "inputs": inputs, "version": config.version}
        rows_of = [[{name: one.levels[name] for name in config.over} for one in row] for row in rows]
        key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
        code = self._code_of(where, words, config.code) if self.has_code else {}
        cost = self._cost(config, text)
        return Node(step, config, own, words, text.nodes, key, inputs, code, cost, rows_of, before_rows)

    def _code_of(self, where: str, words: Sequence[str], more: Sequence[str]) -> dict[str, str]:
        """Most steps run the same few programs."""
        known = (*map(str, programs(words)), *more)
        if known not in self._code:
            try:
                self._code[known] = code_of(words, more)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
        return self._code[known]

    def _cost(self, config: StepConfig, text: _Text) -> dict[str, str]:
        """Raises UserError where it depends on more factors than the step."""
        own, found = _Text(self, f"{text.where}.cost", text.levels), {}
        for name in ("tokens", "prompt_tokens", "flops", "hours"):
            if config.cost is not None and (value := getattr(config.cost, name)) is not None:
                found[name] = own.text(str(value))
        if more := [factor for factor in own.factors if factor not in text.factors]:
            raise UserError(f"{own.where}: {{{more[0]}}} is no factor of the step's command, which runs once for all "
                            f"its levels")  # fmt: skip
        return found

    def _inputs(self, where: str, words: Sequence[str], declared: Sequence[str]) -> dict[str, str]:
        """The fingerprints of the files and folders that a command names, as a word or behind "="."""
        for path in declared:
            if "\0" in path or not (path in self._fingerprints or os.path.exists(path)):
                shown = re.sub("\0\\w+\0", "{...}", path)
                raise UserError(f"{where}.inputs: {shown}: no such file or folder (the output of a step belongs in the "
                                f"command)")  # fmt: skip
        texts = [text for word in words for text in (word, word.partition("=")[2])]
        named = [text for text in texts if text in self._fingerprints or _is_input(text)]
        for path in (found := dict.fromkeys([*named, *declared])):
            if path not in self._fingerprints:
                self._fingerprints[path] = fingerprint(Path(path))
        return {path: self._fingerprints[path] for path in found}


def _words(config: StepConfig, text: _Text, every: Sequence[_Text]) -> tuple[list[str], list[list[_Text]]]:
    """The arguments of a step. A word that mentions factors of `over` is there for each of their combinations, `every`,
    but once for those for which all such words are the same; these are returned together."""
    if not every:
        return [each for word in config.command for each in text.words(word)], []
    columns: list[tuple[bool, list[list[str]]]] = []
    for word in config.command:
        found: list[list[str]] = []
        mentions = False
        for one in every:
            before, one.factors = one.factors, {}
            found.append(one.words(word))
            mentions |= not one.factors.keys().isdisjoint(config.over)
            one.factors |= before
        columns.append((mentions, found))
    rows: dict[str, list[int]] = {}
    for number in range(len(every)):
        rows.setdefault(json.dumps([found[number] for mentions, found in columns if mentions]), []).append(number)
    if not any(mentions for mentions, _ in columns):
        raise UserError(f"{text.where}.over: no word of the command mentions {', '.join(config.over)}")
    firsts = [row[0] for row in rows.values()]
    words = [each for mentions, found in columns for number in (firsts if mentions else [0]) for each in found[number]]
    return words, [[every[number] for number in row] for row in rows.values()]


def _is_input(text: str) -> bool:
    # A folder only where it is written as a path: a level may have the name of a folder by chance. Programs are code.
    if not text or "\0" in text or len(text) > 4096 or text.endswith(".py"):
        return False
    return os.path.isfile(text) or ("/" in text and os.path.isdir(text))


def fingerprint(path: Path) -> str:
    """Of the content of a file or folder; of large ones, of a part that is spread over them."""
    if path.is_file():
        return file_fingerprint(path)
    files = sorted(one for one in path.rglob("*") if one.is_file())
    blocks = max(2, _FOLDER_BLOCKS // max(len(files), 1))
    lines = [f"{one.relative_to(path)} {file_fingerprint(one, blocks)}" for one in files]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def label(node: Node) -> str:
    """The levels of a node in the name of its folder."""
    text = "_".join(re.sub(r"[^A-Za-z0-9.=+-]+", "-", level) for level in node.levels.values())
    return (text or "all")[:_LABEL].strip("-.")
