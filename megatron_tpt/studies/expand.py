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
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.files import file_fingerprint
from megatron_tpt.studies.code_version import code_of, programs
from megatron_tpt.studies.study import NAME, StepConfig, StudyConfig, levels_of

Levels = Mapping[str, str]
"""Factor: name of the level."""

_PLACEHOLDER = re.compile(rf"\{{\{{({NAME}(?:\.[\w-]+)*)\}}\}}|\{{({NAME}(?:\.[\w-]+)*)\}}")
_BLOCKS = 16
"""The most blocks of 64 KiB of an input that its fingerprint reads."""
_MOST_NODES = 100_000
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
    rows_of: list[dict[str, str]] = field(default_factory=list)
    """With `over`: the levels of each of the combinations, in the order of its words."""
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


@dataclass
class Graph:
    """What a study runs."""

    nodes: dict[str, Node]
    """By key; each stands behind those that it needs."""
    results: list[Wanted]


def expand(config: StudyConfig) -> Graph:
    """The graph of a study. Raises UserError for placeholders without meaning and steps that need each other."""
    return _Expansion(config).graph()


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
    """Replaces placeholders, and notes what they were."""

    def __init__(self, expansion: "_Expansion", levels: Levels) -> None:
        self.expansion, self.levels = expansion, levels
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
        return [text for item in items for text in self.words(_as_text(item, whole[2]), depth + 1)]

    def text(self, word: str, depth: int = 0) -> str:
        """A word with its placeholders replaced."""
        if depth > _MOST_NESTED:
            raise UserError(f"{word}: its placeholders lead back to themselves; correct the levels")

        def replace(found: re.Match[str]) -> str:
            if found[1]:
                return f"{{{found[1]}}}"
            value = self._value(found[2])
            return value if isinstance(value, _Marked) else self.text(_as_text(value, found[2]), depth + 1)

        return _PLACEHOLDER.sub(replace, word)

    def _value(self, name: str) -> Any:
        config, (first, *keys) = self.expansion.config, name.split(".")
        if first == "output" and not keys:
            return _Marked("\0output\0")
        if first in config.steps and not keys:
            node = self.expansion.node(first, self.levels)
            self.nodes[node.key] = node
            self.factors |= dict.fromkeys(node.levels)
            return _Marked(f"\0{node.key}\0")
        if first not in config.factors:
            known = ", ".join([*config.factors, *config.steps, "output"])
            raise UserError(f"{{{name}}} means nothing; known are {known}; write {{{{{name}}}}} for the text itself")
        self.factors[first] = None
        if not keys:
            return self.levels[first]
        value = levels_of(config, first)[self.levels[first]]
        for key in keys:
            if not isinstance(value, dict) or key not in value:
                raise UserError(f"{{{name}}}: the level {self.levels[first]} of {first} holds no {key}; add it")
            value = value[key]
        return value


class _Marked(str):
    """A text in which nothing is replaced."""


def _as_text(value: Any, name: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str | int | float):
        raise UserError(f"{{{name}}}: {value} is neither a text nor a number, nor a list of these in a word of its own")
    return str(value)


class _Expansion:
    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.nodes: dict[str, Node] = {}
        self._known: dict[tuple[str, tuple[str, ...]], Node] = {}
        self._open: list[str] = []
        self._fingerprints: dict[str, str] = {}
        self._code: dict[tuple[str, ...], dict[str, str]] = {}

    def graph(self) -> Graph:
        """The steps with results, those that no other step mentions, and everything that these need."""
        steps = self.config.steps
        mentioned = _mentioned([self.config.factors, [step.command for step in steps.values()]])
        wanted = {name: step for name, step in steps.items() if step.results is not None or name not in mentioned}
        results: dict[str, Wanted] = {}
        for levels in combinations(self.config, list(self.config.factors)):
            for name, step in wanted.items():
                if not all(levels[factor] in names for factor, names in step.only.items()):
                    continue
                node = self.node(name, levels)
                if step.results is not None:
                    text = _Text(self, levels)
                    shares = {before: text.text(str(share)) for before, share in step.results.shares.items()}
                    # Levels of other factors would repeat the same figures, as if they were others.
                    own = {factor: level for factor, level in levels.items() if factor in (*node.levels, *step.over)}
                    before = list(node.before.values())
                    if step.over:
                        before = node.before_rows[node.rows_of.index({factor: levels[factor] for factor in step.over})]
                    results.setdefault(json.dumps([node.key, own]), Wanted(node, own, before, shares))
        if unused := [name for name in steps if not any(node.step == name for node in self.nodes.values())]:
            raise UserError(f"steps.{unused[0]}: no combination of levels runs it; remove it, or what excludes it")
        return Graph(self.nodes, list(results.values()))

    def node(self, step: str, levels: Levels) -> Node:
        """The node of a step with a combination of the levels of all factors."""
        known = step, tuple(levels.values())
        if known not in self._known:
            if step in self._open:
                raise UserError(f"steps.{step}: needs its own output ({' -> '.join([*self._open, step])})")
            self._open.append(step)
            node = self._make(step, levels)
            self._open.pop()
            # The same work for other levels is the same node.
            self._known[known] = self.nodes.setdefault(node.key, node)
            if len(self.nodes) > _MOST_NODES:
                raise UserError(f"more than {_MOST_NODES:,} steps with their levels: give fewer factors or levels")
        return self._known[known]

    def _make(self, step: str, levels: Levels) -> Node:
        config = self.config.steps[step]
        text = _Text(self, levels)
        every = [_Text(self, one) for one in combinations(self.config, config.over, levels)] if config.over else []
        words = [each for word in config.command for each in _words(word, text, every, config.over)]
        before_rows = [list(one.nodes.values()) for one in every]
        for one in (text, *every):
            text.factors |= one.factors
            text.nodes |= one.nodes
        inputs = self._inputs(words, [text.text(path) for path in config.inputs])
        own = {name: levels[name] for name in self.config.factors if name in text.factors and name not in config.over}
        content = {"step": step, "words": words, "inputs": inputs, "version": config.version}
        rows_of = [{name: one.levels[name] for name in config.over} for one in every]
        key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
        code = self._code_of(words, config.code)
        cost = self._cost(config, text)
        return Node(step, config, own, words, text.nodes, key, inputs, code, cost, rows_of, before_rows)

    def _code_of(self, words: Sequence[str], more: Sequence[str]) -> dict[str, str]:
        """Most steps run the same few programs."""
        known = (*map(str, programs(words)), *more)
        if known not in self._code:
            self._code[known] = code_of(words, more)
        return self._code[known]

    def _cost(self, config: StepConfig, text: _Text) -> dict[str, str]:
        """Raises UserError where it depends on more factors than the step."""
        own, found = _Text(self, text.levels), {}
        for name in ("tokens", "flops", "hours"):
            if config.cost is not None and (value := getattr(config.cost, name)) is not None:
                found[name] = own.text(str(value))
        if more := [factor for factor in own.factors if factor not in text.factors]:
            raise UserError(
                f"cost: {{{more[0]}}} is no factor of the step's command, which runs once for all its levels"
            )
        return found

    def _inputs(self, words: Sequence[str], declared: Sequence[str]) -> dict[str, str]:
        """The fingerprints of the files and folders that a command names, as a word or behind "="."""
        for path in declared:
            if "\0" in path or not os.path.exists(path):
                shown = re.sub("\0\\w+\0", "{...}", path)
                raise UserError(
                    f"inputs: {shown}: no such file or folder (the output of a step belongs in the command)"
                )
        named = [text for word in words for text in (word, word.partition("=")[2]) if _is_input(text)]
        return {path: self._fingerprint(path) for path in dict.fromkeys([*named, *declared])}

    def _fingerprint(self, path: str) -> str:
        if path not in self._fingerprints:
            self._fingerprints[path] = _fingerprint(Path(path))
        return self._fingerprints[path]


def _words(word: str, text: _Text, every: Sequence[_Text], over: Sequence[str]) -> list[str]:
    """What a word of a command stands for; one word for each combination of `over`, where it mentions its factors."""
    if not every:
        return text.words(word)
    found = []
    for one in every:
        before, one.factors = one.factors, {}
        found.append(one.words(word))
        mentions = not one.factors.keys().isdisjoint(over)
        one.factors |= before
    return [each for words in found for each in words] if mentions else found[0]


def _is_input(text: str) -> bool:
    # A folder only where it is written as a path: a level may have the name of a folder by chance. Programs are code.
    if not text or "\0" in text or len(text) > 4096 or text.endswith(".py"):
        return False
    return os.path.isfile(text) or ("/" in text and os.path.isdir(text))


def _fingerprint(path: Path) -> str:
    if path.is_file():
        return file_fingerprint(path, _BLOCKS)
    files = sorted(one for one in path.rglob("*") if one.is_file())
    lines = [f"{one.relative_to(path)} {file_fingerprint(one, 2)}" for one in files]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def label(node: Node) -> str:
    """The levels of a node in the name of its folder."""
    text = "_".join(re.sub(r"[^A-Za-z0-9.=+-]+", "-", level) for level in node.levels.values())
    return (text or "all")[:_LABEL].strip("-.")
