"""Thinking-augmented pre-training on Megatron Core, from raw documents to a reasoning model.

The packages stand in layers, each of which imports only what is below it; stages of the data (corpus, thinking,
indexing, training, evaluation, studies) meet in files. docs/architecture.md has the picture, pyproject.toml the
contract that `lint-imports` checks. The programs pretrain.py, finetune.py and rl/__main__.py and the tools are at the
top; at the bottom are single modules (errors, files, names, ...), which import nothing but each other.
"""

__version__ = "0.1.0"
