"""The version of the code that a command runs: a digest of every file that its program imports or reads beside itself.

A program is followed through its imports, those inside functions included, and through what it names: modules behind
"-m" or as "megatron_tpt.x:Class", files beside a module ("driver.py", "heal.yaml") and, in this package, folders of
data beside it; in a program outside this package also "megatron_tpt.pretrain" and "tools/index.py". Comments,
docstrings and formatting of Python files do not count. Installed packages are not followed, nor what is imported from
elsewhere than this package and the folder of the program: `code` of a step names that.
"""

import ast
import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import megatron_tpt
from megatron_tpt.errors import UserError
from megatron_tpt.files import file_fingerprint, real_path

PACKAGE = real_path(Path(megatron_tpt.__file__).parent)
_ROOT = PACKAGE.parent
_NAME = PACKAGE.name
_IMPORT_FAMILIES = (PACKAGE / "recipes/base.py", PACKAGE / "models/spec.py")
"""Import families of models by the names that recipes and checkpoints give."""
_SOURCES = (".py", ".yaml", ".yml", ".jinja")
"""What a program outside this package reads beside itself; other files may be what it writes."""


def code_of(command: Sequence[str], more: Iterable[str] = ()) -> dict[str, str]:
    """Path: digest, of the files that `python COMMAND` runs, and of those in `more`, which are files and folders.

    The paths are relative to the repository or to the current folder where they are in it. Raises UserError for one in
    `more` that is missing.
    """
    waiting = list(programs(command))
    for text in more:
        path = Path(text)
        if not path.exists():
            raise UserError(f"code: {text}: no such file or folder")
        waiting += map(real_path, sorted(path.rglob("*.py")) if path.is_dir() else [path])
    found: dict[Path, str] = {}
    while waiting:
        if (path := waiting.pop()) not in found:
            status = path.stat()
            found[path], named = _read(path, (status.st_mtime_ns, status.st_size))
            waiting += named
    return {_shown(path): digest for path, digest in sorted(found.items())}


def _shown(path: Path) -> str:
    root = next((root for root in (_ROOT, real_path(Path())) if path.is_relative_to(root)), None)
    return str(path if root is None else path.relative_to(root))


def programs(command: Sequence[str]) -> Iterator[Path]:
    """The scripts of a command, and the modules that -m names."""
    for before, word in zip(["", *command], command, strict=False):
        if before == "-m":
            yield from _module_files(word, real_path(Path()))
        elif (path := word.rpartition("=")[2]).endswith(".py") and Path(path).is_file():
            yield real_path(Path(path))


def _module_files(name: str, folder: Path) -> tuple[Path, ...]:
    """The file of a module of this package or in `folder`, and those of the packages around it."""
    return _files_of(name, _ROOT if name.partition(".")[0] == _NAME else folder)


@functools.cache
def _files_of(name: str, root: Path) -> tuple[Path, ...]:
    parent, _, _ = name.rpartition(".")
    around = _files_of(parent, root) if parent else ()
    if parent and not root.joinpath(*parent.split(".")).is_dir():  # of a package that is installed elsewhere
        return around
    place = root.joinpath(*name.split("."))
    return (*around, *(path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()))


@functools.cache
def _read(path: Path, version: tuple[int, int]) -> tuple[str, tuple[Path, ...]]:
    """The digest of a file, and the files that it imports or names; `version` is for the cache."""
    if path.suffix != ".py":
        return file_fingerprint(path)[:16], ()
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: not Python ({error.msg}): correct it") from None
    nodes = list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [one for one in node.body if not _is_text(one)]
    named = dict.fromkeys(found for node in nodes for found in _named_by(node, path))
    if path in _IMPORT_FAMILIES:
        named |= dict.fromkeys(sorted((PACKAGE / "models").rglob("*.py")))
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16], tuple(named)


def _is_text(node: ast.AST) -> bool:
    """Whether a node is a text alone: a docstring of a module, a class, a function or a field."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _named_by(node: ast.AST, path: Path) -> Iterator[Path]:
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        package = path.relative_to(_ROOT).parts[:-1] if path.is_relative_to(PACKAGE) else ()
        parents = package[: len(package) + 1 - node.level] if node.level else ()
        module = ".".join([*parents, *([node.module] if node.module else [])])
        names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield from _named_in(node.value, path)
    elif isinstance(node, ast.List | ast.Tuple):
        texts = [one.value if isinstance(one, ast.Constant) else None for one in node.elts]
        names = [text for before, text in itertools.pairwise(texts) if before == "-m" and isinstance(text, str)]
    for name in names:
        yield from _module_files(name, path.parent)


def _named_in(text: str, path: Path) -> Iterator[Path]:
    """The files that a text in the file `path` names."""
    is_ours = path.is_relative_to(PACKAGE)
    # Not every name of a module in this package: it lists most of its modules somewhere.
    if found := re.fullmatch(rf"({_NAME}(?:\.\w+)+)" + (r":\w*" if is_ours else r"(?::\w*)?"), text):
        yield from _module_files(found[1], _ROOT)
    elif re.fullmatch(r"[\w-][\w.-]*", text) and len(text) < 200:
        beside = path.parent / text
        if beside.is_file() and (is_ours or beside.suffix in _SOURCES):
            yield real_path(beside)
        elif is_ours and beside.is_dir() and not (beside / "__init__.py").exists() and not text.startswith("_"):
            yield from (one for one in sorted(beside.rglob("*")) if one.is_file())
    elif not is_ours and re.fullmatch(r"[\w./-]+/[\w.-]+\.py", text) and (_ROOT / text).is_file():
        yield real_path(_ROOT / text)
