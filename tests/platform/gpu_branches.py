"""Where the package asks for a GPU, or does something on one alone: by file and function, as docs/gpu.md lists them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import megatron_tpt

PACKAGE = Path(megatron_tpt.__file__).parent
# The adaptation of Megatron Core to a CPU, of which nothing is active on a GPU; and what only counts GPUs.
OF_CPUS = ("platform/megatron_core.py", "planning/")
_CODE = re.compile(
    r"torch\.cuda\b|torch\.backends\.cuda|torch\._C\.\w+\.\w*nccl|\.cuda\b|\.is_cuda\b|\bis_gpu\b|\bon_gpu\b|\bnum_gpus\b"
    r"|device\.type|\bdevice_type\b|\btransformer_engine\b|\bis_nccl_available\b|\bpin_memory\b"
)
_TEXT = re.compile(r"\bcuda\b|\bnccl\b|nvidia-smi|\btransformer_engine\b|\bapex\b|_cuda\b|\bamp_C\b|CUDA_|NCCL_|NVTE_")


def _own_nodes(body: list[ast.stmt], name: str) -> Iterator[tuple[str, ast.AST]]:
    """Every node with the function or class it stands in."""
    for statement in body:
        stack: list[ast.AST] = [statement]
        while stack:
            node = stack.pop()
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield from _own_nodes(node.body, f"{name}.{node.name}".removeprefix("."))
                stack += [*node.decorator_list, *(node.args.defaults if isinstance(node, ast.FunctionDef) else [])]
                continue
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue  # a docstring
            yield name, node
            stack += ast.iter_child_nodes(node)


def _is_of_gpus(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and _TEXT.search(node.value) is not None
    if isinstance(node, ast.Import | ast.ImportFrom):
        module = getattr(node, "module", None) or ""
        of_gpus = ("transformer_engine", "vllm.distributed.weight_transfer")
        return any(f"{module}.{alias.name}".strip(".").startswith(of_gpus) for alias in node.names)
    if isinstance(node, ast.Attribute | ast.Name):
        return _CODE.search(ast.unparse(node)) is not None
    return False


def branches() -> dict[str, list[int]]:
    """`file.py:function` of every place, with its lines; `file.py` alone for what stands outside functions."""
    found: dict[str, set[int]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        file = str(path.relative_to(PACKAGE))
        if file.startswith(OF_CPUS):
            continue
        for name, node in _own_nodes(ast.parse(path.read_text()).body, ""):
            if _is_of_gpus(node):
                found.setdefault(f"{file}:{name}".removesuffix(":"), set()).add(node.lineno)
    return {place: sorted(lines) for place, lines in found.items()}
