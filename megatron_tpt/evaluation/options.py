"""The options of `tools/evaluate.py`. Light to import: the help of the command line needs nothing else."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from megatron_tpt.config import cli
from megatron_tpt.config.fields import FLAT, PositiveInt
from megatron_tpt.config.yaml_file import load_yaml
from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.benchmark import Benchmark, files_of
from megatron_tpt.generation import DType, EngineKind, EngineOptions
from megatron_tpt.jobs.options import ScaleOptions


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(Benchmark):
    """Which models answer which problems, and how their answers are read."""

    model: list[str] = field(default_factory=list)
    """Hugging Face model folders or Hub ids; several are evaluated one after another. For the engine endpoint, the name
    under which the model is served."""
    output: Path
    """The folder for results.json, report.md, report.html and, in a folder per model and benchmark, samples.jsonl.zst.
    With --run, one such folder per checkpoint.
    """
    run: Path | None = None
    """Instead of models: the folder of a training run, whose checkpoints are exported and evaluated one after another.
    Their figures are shown beside those of training, in RUN/tensorboard/evaluation."""
    follow: bool = False
    """With --run, also evaluate the checkpoints to come, up to that of the last step."""
    benchmark: list[str] = field(default_factory=list)
    """Benchmarks and suites by their names, or YAML files of your own. Options that are given here win over theirs."""
    data_dir: Path | None = None
    """The folder with the files of the benchmarks; without it their data come from the Hub."""
    rescore: bool = False
    """Grade the outputs that are in the output folder again, without a model, and show what changes."""
    engine: EngineKind = "vllm"
    """What runs the model: vLLM in this process, vLLM servers on all GPUs, servers that run already, or transformers.
    """
    tokenizer: str | None = None
    """The folder or Hub id of the tokenizer; by default the model's. The engine endpoint needs it."""
    endpoints: list[str] = field(default_factory=list)
    """Base URLs for the engine endpoint, as in http://host:8000/v1."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key for the endpoints."""
    num_engines: PositiveInt | None = None
    """Servers that vllm-server starts; by default as many as the GPUs have room for."""
    dtype: DType = "auto"
    """Number format of the model; "auto" is what its config.json says."""
    tensor_parallel_size: PositiveInt = 1
    """Number of devices that share the model."""
    max_num_seqs: PositiveInt | None = None
    """Most answers computed at once; by default 256 on CPUs and vLLM's own choice on GPUs."""
    scale: Annotated[ScaleOptions, FLAT] = field(default_factory=ScaleOptions)
    task: int | None = None
    """Do this task alone; set by --executor and --num-tasks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.model) == (self.run is not None):
            raise UserError("give either --model or --run: which models answer")
        if self.run is not None and (self.rescore or self.scale.is_split or self.engine == "endpoint"):
            raise UserError(
                "--run evaluates checkpoints in this process: omit --rescore, --num-tasks, --executor and "
                "--engine endpoint"
            )
        if self.follow and self.run is None:
            raise UserError("--follow waits for the checkpoints of --run: give both")
        if not self.benchmark and self.data is None and self.data_file is None:
            raise UserError("no problems were given: name a --benchmark, or --data with rows of your own")
        if self.engine == "endpoint" and self.tokenizer is None:
            raise UserError("--engine endpoint needs --tokenizer: prompts are sent as its tokens, and counted")
        self.engine_options("model", None)  # refuses what does not fit together

    def engine_options(self, model: str, context: int | None) -> EngineOptions:
        """The engine for `model`, with room for `context` tokens."""
        return EngineOptions(
            model,
            context,
            self.dtype,
            self.tensor_parallel_size,
            self.max_num_seqs,
            self.engine,
            self.num_engines,
            tuple(self.endpoints),
            api_key_env=self.api_key_env,
        )


def parse_benchmarks(argv: Sequence[str] | None = None, *, description: str | None = None) -> list[EvaluateOptions]:
    """The options of a command line, once for every benchmark that it names: those of the benchmark's file, and over
    them those of the command line. Raises UserError with all that is wrong."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = cli.parse(EvaluateOptions, argv, description=description)
    if not options.benchmark:
        return [options]
    if options.data is not None:
        raise UserError("--data and --benchmark exclude each other: a benchmark names its data, see --data-dir")
    runs = []
    for name in options.benchmark:
        for files in files_of(name):
            words = [word for file in files for word in ("--recipe", str(file))]
            if "name" not in load_yaml(files[0])[0]:
                words += ["--name", files[0].stem]
            runs.append(cli.parse(EvaluateOptions, [*words, *argv]))
    return runs
