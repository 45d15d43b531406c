"""What engines on a CPU compute in, and with how many threads."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import make_model

from megatron_tpt.generation import EngineOptions, cpu
from megatron_tpt.generation.cpu import computing_threads, dtype_name, num_cores, num_threads, stored_dtype

AVX2 = "processor : 0\nflags\t\t: fpu sse2 avx2 fma\n\n"
AVX512 = "processor : 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\n\n"
NEOVERSE = "processor : 0\nFeatures\t: fp asimd asimdhp bf16\n\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model whose config.json says bfloat16."""
    folder = Path(make_model(tmp_path / "hf"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return folder


@pytest.mark.parametrize(
    "info, stored, expected",
    [
        (AVX2, "bfloat16", "float32"),
        (AVX2, "float16", "float32"),
        (AVX2, None, "float32"),  # vLLM's own choice would be half precision
        (AVX512, "bfloat16", "auto"),
        (AVX512, "float16", "float32"),
        (AVX512, "float32", "float32"),
        (NEOVERSE, "bfloat16", "auto"),
        (NEOVERSE, "float16", "auto"),
        ("", "bfloat16", "auto"),  # another system than Linux
    ],
)
def test_the_format_is_one_that_the_processor_has_instructions_for(
    info: str, stored: str | None, expected: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((model / "config.json").read_text())
    del config["dtype"]
    (model / "config.json").write_text(json.dumps(config | ({"dtype": stored} if stored else {})))
    (model / "cpuinfo").write_text(info)
    monkeypatch.setattr(cpu, "_CPU_INFO", model / ("cpuinfo" if info else "missing"))
    assert stored_dtype(str(model)) == stored
    assert dtype_name(EngineOptions(str(model)), on_cpu=True) == expected
    assert dtype_name(EngineOptions(str(model), dtype="bfloat16"), on_cpu=True) == "bfloat16"  # the user's
    assert dtype_name(EngineOptions(str(model)), on_cpu=False) == ("float32" if stored == "float32" else "auto")


def test_there_is_a_thread_for_every_core_that_this_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4})
    for number, siblings in enumerate(["0,4", "1,5", "2,6", "3,7", "0,4"]):
        folder = tmp_path / f"cpu{number}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    monkeypatch.setattr(cpu, "_TOPOLOGY", tmp_path)
    monkeypatch.setattr(cpu, "_CGROUP", tmp_path)
    assert num_cores() == 4  # 0 and 4 are one core
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert num_cores() == 4
    (tmp_path / "cpu.max").write_text("250000 100000\n")  # as a container with 2.5 processors
    assert num_cores() == 2
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    for name, value in (("quota", "50000"), ("period", "100000")):
        (tmp_path / f"cpu/cpu.cfs_{name}_us").write_text(value)
    assert num_cores() == 1
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert (num_threads(), num_threads(2), num_threads(9)) == (4, 2, 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
    assert (num_threads(), num_threads(2)) == (3, 3)  # the user's


def test_the_log_says_what_was_chosen_and_why(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (model / "cpuinfo").write_text(AVX2)
    monkeypatch.setattr(cpu, "_CPU_INFO", model / "cpuinfo")
    options = EngineOptions(str(model))
    with caplog.at_level(logging.INFO), computing_threads(options, dtype_name(options, on_cpu=True)):
        pass
    assert caplog.messages == [
        "on the CPU: float32 in place of bfloat16, for which this processor has no instructions; "
        f"threads: {os.environ['OMP_NUM_THREADS']} (OMP_NUM_THREADS)"
    ]


def test_engines_in_this_process_compute_with_what_was_chosen(model: Path) -> None:
    """vLLM has settings of its own for threads, which it applies while it starts, and lets nobody change them later."""
    program = f"""
import os, torch
from megatron_tpt.generation import EngineOptions, open_engine
for kind in ("vllm", "transformers"):
    with open_engine(EngineOptions({str(model)!r}, 64, max_num_seqs=2, kind=kind)) as engine:
        print(engine.dtype, torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS"))
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    dtype = dtype_name(EngineOptions(str(model)), on_cpu=True).replace("auto", "bfloat16")
    assert done.stdout.splitlines() == [f"{dtype} {num_cores()} None"] * 2
