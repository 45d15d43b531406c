"""The operations of the random driver: how programs are called on `random_inputs`, and what their output adds up to."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zstandard
from test_messages import options_of_recipe, options_of_tools

from megatron_tpt.recipes.finetune import FinetuneRecipe
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.records import read_records

TOOLS = Path(__file__).resolve().parents[1] / "tools"
URL = "{endpoint}"
"""Stands for the server's address in arguments."""
ALL_PASS = "--filters.min-words 0 --filters.max-repeated-share 1 --filters.loop-words 0 --filters.max-foreign-share 1"


@dataclass(frozen=True)
class Operation:
    """A command whose output goes to out/ in the working directory."""

    command: str
    """Without python; the first word is a tool's name, or -m for a module."""
    inputs: tuple[str, ...] = ()
    """Files and folders that it reads, and that may be damaged."""
    check: Callable[[Path], None] = lambda out: None
    """Whether the counts in a finished output add up."""
    recipe: type | None = None
    weight: float = 1.0
    is_light: bool = True
    """Whether mistakes are tried, and not only interruptions."""
    mistake_codes: tuple[int, ...] = (2,)

    @property
    def name(self) -> str:
        """As in "index"; the programs of one name differ in their options."""
        words = self.command.split()
        return words[0] if words[0] != "-m" else next(w for w in words if w.startswith("megatron_tpt")).split(".")[-1]

    def arguments(self, url: str) -> tuple[list[str], list[str]]:
        """What names the program for python, and its arguments."""
        words = self.command.replace(URL, url).split()
        start = next(i for i in range(len(words)) if words[0] != "-m" or words[i].startswith("megatron_tpt")) + 1
        program = [str(TOOLS / f"{words[0]}.py")] if words[0] != "-m" else words[:start]
        return program, words[start:]

    def options(self) -> list[str]:
        """All options that the program has."""
        return sorted(options_of_recipe(self.recipe) if self.recipe else options_of_tools()[self.name])


def _json(path: Path) -> dict:
    return json.loads(path.read_text())


def _num_lines(folder: Path) -> int:
    return sum(
        zstandard.ZstdDecompressor().stream_reader(path.open("rb")).read().count(b"\n")
        for path in folder.glob("part-*")
    )


def _check_prepared(out: Path) -> None:
    report = _json(out / "job/report.json")
    num_kept = len(list(read_records(sorted((out / "job").glob("part-*")))))
    assert report["num_kept"] == num_kept
    assert sum(report["dropped"].values()) == _num_lines(out / "job/rejects")
    assert report["num_rows"] == num_kept + _num_lines(out / "job/rejects")


def _check_index(out: Path) -> None:
    counts = _json(out / "job.json")["counts"]
    header = (out / "job.idx").read_bytes()
    num_sequences, num_bounds = np.frombuffer(header, "<u8", 2, offset=18)
    width = {8: 2, 4: 4}[header[17]]
    assert counts["documents"] == num_bounds - 1
    assert counts["tokens"] == np.frombuffer(header, "<i4", num_sequences, offset=34).sum()
    assert counts["tokens"] == (out / "job.bin").stat().st_size // width
    assert counts["tokens"] == counts["document_tokens"] + counts["thinking_tokens"]
    sources = _json(out / "job.json")["sources"]
    assert sum(source["documents"] for source in sources) == counts["documents"]


def _check_packed(out: Path) -> None:
    manifest = _json(out / "job.sft.json")
    counts = manifest["counts"]
    assert sum(source["documents"] for source in manifest["sources"]) == counts["examples"]
    assert 0 < counts["loss_tokens"] <= counts["tokens"] and counts["fewest_rows"] <= counts["rows"]


def _check_thoughts(out: Path) -> None:
    ledger = [
        json.loads(line) for path in (out / "job/.work/ledger").iterdir() for line in path.read_text().splitlines()
    ]
    shards = {entry["block"]: entry["statistics"] for entry in sorted(ledger, key=lambda entry: entry["revision"])}
    records = list(read_records(sorted((out / "job").glob("part-*"))))
    assert sum(one["records"] for one in shards.values()) == len(records)
    assert sum(sum(one["rejects"].values()) for one in shards.values()) == _num_lines(out / "job/rejects")


def _check_tokenizer(out: Path) -> None:
    vocabulary = _json(out / "job/tokenizer.json")["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))


def _check_run(out: Path) -> None:
    rows = [json.loads(line) for line in (out / "run/metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == sorted(set(steps)) and steps
    tokens = [row["tokens"] for row in rows if "loss" in row]
    assert tokens == [step * tokens[0] // steps[0] for step in steps]


def _check_model(out: Path) -> None:
    from safetensors.numpy import load_file

    assert _json(out / "job/config.json")["hidden_size"] == 64
    assert all(np.isfinite(tensor).all() for tensor in load_file(out / "job/model.safetensors").values())


PREPARE = "prepare --input documents --output out/job --rows-per-shard 13"
PACK = "pack_sft --tokenizer tokenizer --output out/job --sequence-length 64"
AUGMENT = (
    f"augment --input documents --output out/job --model teacher --engine endpoint --endpoints {URL} --api chat "
    f"--prompt bare.txt --rows-per-shard 7 --max-new-tokens 40 --request-timeout-s 10 {ALL_PASS} --on-bad-record skip"
)
PRETRAIN, FINETUNE = "megatron_tpt.pretrain pretrain.yaml", "megatron_tpt.finetune finetune.yaml"
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node=2"
DOCUMENTS, INDICES = ("documents/a.jsonl", "documents/b.jsonl.zst"), ("index/a", "index/b")

INDEX = "index --input documents --tokenizer tokenizer --output out/job"
MINHASH = "--deduplicate minhash --decontaminate p=pairs.jsonl:prompt"
PAIRS = "--input pairs.jsonl --prompt-column prompt --response-column response"
INIT = "--training.init_from=checkpoint"
CACHE = "build_cache pretrain.yaml --cache-dir out/job"
PARALLEL = "--parallel.tensor_parallel_size=2"

OPERATIONS = (
    Operation(PREPARE, DOCUMENTS, _check_prepared),
    Operation(f"{PREPARE} {MINHASH}", (*DOCUMENTS, "pairs.jsonl"), _check_prepared),
    Operation("train_tokenizer --input documents --vocab-size 300 --output out/job", DOCUMENTS, _check_tokenizer),
    Operation(INDEX, (*DOCUMENTS, "tokenizer"), _check_index),
    Operation(f"{INDEX} --on-bad-record skip --join interleaved", DOCUMENTS, _check_index),
    Operation(f"{INDEX} --shard-size 1KB", DOCUMENTS),
    Operation("merge_index --input index/a index/b --output out/job", INDICES, _check_index),
    Operation("inspect_index index/a --verify", INDICES[:1], mistake_codes=(1, 2)),
    Operation("inspect_index index/sft --document 3", ("index/sft",)),
    Operation(f"{PACK} --input chats.jsonl", ("chats.jsonl", "tokenizer"), _check_packed),
    Operation(
        f"{PACK} --input chats.jsonl --on-bad-record skip --on-too-long truncate", ("chats.jsonl",), _check_packed
    ),
    Operation(f"{PACK} {PAIRS}", ("pairs.jsonl",), _check_packed),
    Operation(AUGMENT, (*DOCUMENTS, "bare.txt"), _check_thoughts),
    Operation(f"{AUGMENT} --num-tasks 2", DOCUMENTS, _check_thoughts, is_light=False, weight=0.3),
    Operation("analyze_thinking --by finish_reason --input thought --output out/job", ("thought",), weight=0.5),
    Operation("import_hf --model model --output out/job", ("model",)),
    Operation("export_hf --checkpoint checkpoint --output out/job", ("checkpoint",), _check_model),
    Operation(CACHE, ("pretrain.yaml", *INDICES), recipe=PretrainRecipe, weight=0.5),
    Operation(f"-m {PRETRAIN}", ("pretrain.yaml", *INDICES), _check_run, PretrainRecipe),
    Operation(f"-m {PRETRAIN} {INIT}", ("checkpoint",), _check_run, PretrainRecipe),
    Operation(f"-m {FINETUNE} {INIT}", ("finetune.yaml", "index/sft"), _check_run, FinetuneRecipe),
    Operation(
        f"-m {FINETUNE} --data.train=[pairs.jsonl]", ("finetune.yaml", "pairs.jsonl"), _check_run, FinetuneRecipe
    ),
    Operation(f"{TORCHRUN} -m {PRETRAIN} {PARALLEL}", (), _check_run, is_light=False, weight=0.3),
)


def input_files(box: Path, operation: Operation) -> list[Path]:
    """The files that an operation reads; those of an index and of a folder are many."""
    found: list[Path] = []
    for name in operation.inputs:
        place = box / name
        found += [place] if place.is_file() else [path for path in sorted(place.rglob("*")) if path.is_file()]
        found += sorted(path for path in place.parent.glob(f"{place.name}.*") if path.is_file() and place != path)
    return found
