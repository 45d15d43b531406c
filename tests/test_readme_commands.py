"""Every command of README.md and docs/ is run by a test, or says what it needs that a test has not."""

import ast
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
import zstandard
from chat_templates import CHATML
from test_documents import GENERATED
from test_messages import OF_OTHER_PROGRAMS, OF_TRAINING, OPTION, is_option, options_of_recipe, options_of_tools
from test_tutorial import NOISE
from tiny_models import VOCAB_SIZE, make_model

from megatron_tpt.config.load import recipe_from_dict
from megatron_tpt.indexing.index import index
from megatron_tpt.indexing.options import IndexOptions, TrainTokenizerOptions
from megatron_tpt.indexing.train_tokenizer import train_tokenizer
from megatron_tpt.recipes.finetune import FinetuneRecipe
from megatron_tpt.recipes.pretrain import PretrainRecipe

ROOT = Path(__file__).resolve().parents[1]
# In the order in which README.md names them: a command may use what one before it made.
NAMED = dict.fromkeys(re.findall(r"\]\((docs/\w[\w-]*\.md)", (ROOT / "README.md").read_text()))
PAGES = ["README.md", *(page for page in NAMED if page not in GENERATED)]
COMMAND = re.compile(r"(?:\w+=\S+ )*(?:python|torchrun|make|sbatch|source|tpt-[\w-]+) ")
NEEDS = re.compile(r"needs? (?:a GPU|GPUs|a cluster|the network|hours)")
# Which test runs a command that begins so, or all commands of a page.
RUN_BY = {
    "docs/cluster.md": "tests/test_documents.py::test_a_dry_run_prints_what_its_page_shows",
    "docs/tutorial.md": "tests/test_tutorial.py::test_every_command_of_the_tutorial_works_as_typed",
    "python tools/augment.py --input examples/three_documents.jsonl": (
        "tests/thinking/test_augment_chat.py::test_three_documents_are_thought_about_by_any_chat_server"
    ),
    "python tools/convert_tokenizer.py --input MODEL_DIR": (
        "tests/indexing/test_convert_tokenizer.py::test_a_sentencepiece_model_gives_the_same_tokens"
    ),
    "make demo": "tests/demo/test_demo.py::test_the_demo_compares_its_arms",
    "torchrun --nproc-per-node 2 -m megatron_tpt.rl RECIPE.yaml": (
        "tests/rl/test_rl_loop.py::test_a_step_has_the_same_gradient_under_every_layout"
    ),
    "source .venv/bin/activate": "tests/test_tutorial.py::test_every_command_of_the_tutorial_works_as_typed",
}
# What a reader puts in the place of the page's names, and sizes for two CPU cores.
IN_PLACE_OF = {
    "TOKENIZER_DIR": "tokenizer",
    "HuggingFaceTB/SmolLM2-135M-Instruct": NOISE,
    "Qwen/Qwen3-8B": f"{NOISE} --max-new-tokens 64",
    "--sequence-length 4096": "--sequence-length 64",
    "--tokenizer DIR": "--tokenizer tokenizer",
    "--model HF_DIR --output CHECKPOINT": "--model models/smollm2 --output imported",
    "--checkpoint RUN/checkpoints/latest --output HF_DIR": "--checkpoint runs/a/checkpoints/latest --output exported",
    "--model model/": "--model runs/sft/model",
    "--data-dir DIR --limit 20 --max-new-tokens 256": "--data-dir . --limit 20 --max-new-tokens 8",
    "--data problems.jsonl": "--data problems.jsonl --max-new-tokens 8",
    "--estimate 200": "--estimate 3",
    "--split 8,10,6": "--split 0,1,1",
}
SMALL = {
    "{preset: llama3.2-1b}": "{num_layers: 2, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 2}",
    "num_steps: 1000": "num_steps: 3",
    "sequence_length: 8192": "sequence_length: 64",
    "global_batch_size: 512": "global_batch_size: 64",
    "dtype: bfloat16": "dtype: float32",
    "warmup_steps: 100": "warmup_steps: 1",
    "save_interval: 200": "save_interval: 2",
}  # fmt: skip


@dataclass(frozen=True)
class Shown:
    """A command as a page shows it."""

    page: str
    text: str
    comment: str

    @property
    def needs(self) -> bool:
        return NEEDS.search(self.comment) is not None

    @property
    def run_by(self) -> str | None:
        """The test that runs it, if it is not the one in this file."""
        starts = [start for start in RUN_BY if start == self.page or self.text.startswith(start)]
        return RUN_BY[starts[0]] if starts else None


def shown_commands() -> Iterator[Shown]:
    """The commands in the fenced and indented blocks of all pages, in order, each once; "..." is no whole command."""
    seen = set[str]()
    for page in PAGES:
        content = (ROOT / page).read_text().replace("\\\n", " ")
        blocks = re.findall(r"^```(\w*)\n(.*?)^```", content, re.DOTALL | re.MULTILINE)
        blocks += [("", line) for line in re.findall(r"^    (\S.*)$", content, re.MULTILINE)]
        lines = [line for language, block in blocks if language in ("", "bash") for line in block.splitlines()]
        for line in filter(COMMAND.match, lines):
            text, _, comment = line.partition(" # ")
            command = Shown(page, " ".join(text.split()), comment)
            if "..." not in command.text and command.text not in seen:
                seen.add(command.text)
                yield command


def shown_files() -> dict[str, str]:
    """The files that pages show, by the name in their first line."""
    blocks = [
        block for page in PAGES for block in re.findall(r"^```(?:yaml|python)\n# (\w+\.(?:yaml|py)\b.*?)^```",
        (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    ]  # fmt: skip
    return {re.split(r"[^\w.]", block)[0]: block.partition("\n")[2] for block in blocks}


def readme_recipe() -> str:
    return shown_files()["recipe.yaml"]


def test_every_command_is_run_here_or_by_a_test_that_exists_or_says_what_it_needs() -> None:
    commands = list(shown_commands())
    assert len(commands) > 30
    here = [command for command in commands if not command.needs and command.run_by is None]
    assert {"README.md", "docs/data.md", "docs/huggingface.md", "docs/tokenizers.md"} <= {one.page for one in here}
    # A program that takes hours, the network or more than this machine does not slip in among those run here.
    assert not [command for command in here if not re.match(r"python |torchrun ", command.text)]
    for start in RUN_BY:
        assert [command for command in commands if start == command.page or command.text.startswith(start)], start
    for node in RUN_BY.values():
        path, name = node.split("::")
        tree = ast.parse((ROOT / path).read_text())
        assert name in [function.name for function in tree.body if isinstance(function, ast.FunctionDef)], node


def test_every_option_of_a_shown_command_exists() -> None:
    recipe = {name.replace("_", "-") for kind in (PretrainRecipe, FinetuneRecipe) for name in options_of_recipe(kind)}
    recipe |= OF_TRAINING | OF_OTHER_PROGRAMS
    num_options = 0
    for command in shown_commands():
        tool = re.search(r"tools/(\w+)\.py", command.text)
        known = options_of_tools().get(tool[1], recipe) if tool else recipe
        if not command.text.startswith("sbatch"):
            unknown = [name for name in OPTION.findall(command.text) if not is_option(name, known)]
            assert not unknown, command
            num_options += len(OPTION.findall(command.text))
    assert num_options > 40


def test_the_recipe_of_the_readme_is_one() -> None:
    recipe = recipe_from_dict(PretrainRecipe, yaml.safe_load(readme_recipe()))
    assert recipe.training.global_batch_size == 512 and len(recipe.data.train) == 2
    assert all(text in readme_recipe() for text in SMALL)


def _write_what_a_reader_has(folder: Path) -> None:
    for name in ("tools", "examples", "megatron_tpt"):
        (folder / name).symlink_to(ROOT / name)
    words = (ROOT / "examples/tutorial/texts.jsonl").read_text().splitlines()
    (folder / "raw").mkdir()
    (folder / "raw/texts.jsonl").write_text("\n".join(words) + "\n")
    problems = [
        {"question": f"What is {i} and {i}?", "prompt": f"What is {i} and {i}?", "answer": str(2 * i)} for i in range(9)
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    for name in ("problems.jsonl", "gsm8k_test.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in problems))
    chats = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}]
        for row in problems
    ]
    content = "".join(json.dumps({"messages": messages}) + "\n" for messages in chats * 9)
    (folder / "chats.jsonl").write_text(content)
    (folder / "chats.jsonl.zst").write_bytes(zstandard.compress(content.encode()))
    (folder / "chat.jinja").write_text(CHATML)
    train_tokenizer(
        TrainTokenizerOptions(
            [folder / "raw"], folder / "tokenizer", vocab_size=VOCAB_SIZE, chat_template=folder / "chat.jinja",
            special_tokens=["<|im_start|>", "<|im_end|>"],
        )
    )  # fmt: skip
    for name in ("plain", "shard-0", "shard-1"):
        index(IndexOptions([folder / "raw"], folder / "tokenizer", folder / "data" / name))
    # No network here: random weights in place of the Hub's.
    make_model(folder / "models/smollm2", context=8192)
    shutil.copytree(folder / "tokenizer", folder / "models/smollm2", dirs_exist_ok=True)
    files = shown_files()
    for text, small in SMALL.items():
        files["recipe.yaml"] = files["recipe.yaml"].replace(text, small)
    for name, content in files.items():
        (folder / name).write_text(content)


@pytest.mark.example(minutes=12)
@pytest.mark.timeout(2400)
def test_the_commands_run_one_after_another_as_shown(tmp_path: Path) -> None:
    _write_what_a_reader_has(tmp_path)
    path = f"{ROOT / '.venv/bin'}{os.pathsep}{os.environ['PATH']}"
    for command in shown_commands():
        if command.needs or command.run_by is not None:
            continue
        text = command.text
        for name, given in IN_PLACE_OF.items():
            text = text.replace(name, given)
        done = subprocess.run(
            text, shell=True, cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert json.loads((tmp_path / "results/results.json").read_text())["models"]
