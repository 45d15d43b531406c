"""What a run shows of itself: TensorBoard's charts, hyper-parameters and recipe, tools/report.py, Prometheus' file,
W&B and trackio; the pages as a browser shows them."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from browser import Page, browse, needs_chromium
from ports import free_port
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from training_runs import finish, start_training

from megatron_tpt.config.load import recipe_from_dict
from megatron_tpt.errors import UserError
from megatron_tpt.monitoring.report import write_report
from megatron_tpt.monitoring.report_options import ReportOptions
from megatron_tpt.provenance import STARTS, described_variables
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.training.metric_sinks import CHARTS, hyper_parameters, metrics_of_chart, prometheus_text
from megatron_tpt.training.metrics_writer import MetricsWriter

pytestmark = pytest.mark.slow(minutes=0.5)
PICTURES = os.environ.get("PICTURES")
"""A folder in which to keep the pictures, to look at them."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, recipe: dict, index_prefix: Path) -> Path:
    """A run that was stopped after its first step and resumed, with two sources and validation."""
    folder = tmp_path_factory.mktemp("pages") / "first"
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{index_prefix}{suffix}", folder.parent / f"other{suffix}")
    sources = [
        {"path": str(index_prefix), "name": "a", "weight": 3},
        {"path": str(folder.parent / "other"), "name": "b<i>", "weight": 1},
    ]
    raw = recipe | {
        "run": {"output_dir": str(folder)},
        "data": {"train": sources, "validation": [{"path": str(index_prefix)}]},
        "training": recipe["training"] | {"validation_interval": 5},
        "logging": {"log_interval": 1},
    }
    path = folder.parent / "first.yaml"
    path.write_text(yaml.safe_dump(raw))
    stopped = start_training(path, "--run.time_limit_min=0")
    assert "the same command resumes" in stopped.communicate()[0] and stopped.returncode == 75
    finish(start_training(path))
    return folder


def events(run: Path) -> EventAccumulator:
    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    return found


def test_tensorboard_has_charts_for_the_metrics_of_a_run(run: Path) -> None:
    found = events(run)
    layout = layout_pb2.Layout()
    layout.ParseFromString(found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == [
        name for name in CHARTS if name not in ("Depth", "Reinforcement learning")
    ]
    scalars = found.Tags()["scalars"]
    for category in layout.category:
        for chart in category.chart:
            shown = [tag for tag in scalars if any(re.match(one, tag) for one in chart.multiline.tag)]
            # A CPU has no known peak and no such sensor, and there is a single set.
            is_absent = chart.title in ("MFU", "power of the first GPU, W", "by validation set")
            assert bool(shown) != is_absent, chart.title
    assert {"source_loss/a", "source_loss/b<i>"} <= set(scalars)
    assert len(found.Scalars("loss")) == 20, "a resume repeats no step"


def test_tensorboard_has_the_recipe_as_text_and_as_hyper_parameters(run: Path) -> None:
    found = events(run)
    text = found.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    training:\n" in text and "      global_batch_size: 8\n" in text
    data = {}
    for tag, content in found.summary_metadata.items():
        if tag.startswith("_hparams_/"):
            data[tag] = plugin_data_pb2.HParamsPluginData.FromString(content.plugin_data.content)
    start = data["_hparams_/session_start_info"].session_start_info
    assert start.hparams["training.global_batch_size"].number_value == 8
    assert start.hparams["logging.tensorboard"].string_value == "true"
    shown = [info.name.tag for info in data["_hparams_/experiment"].experiment.metric_infos]
    assert shown == ["loss", "tokens_per_s", "validation_loss"]
    assert data["_hparams_/session_end_info"].session_end_info.status == 1  # success


def test_each_start_is_recorded_without_secrets(run: Path) -> None:
    first, second = [json.loads(line) for line in (run / STARTS).read_text().splitlines()]
    assert (first["step"], second["step"]) == (0, 1) and "--run.time_limit_min=0" in first["command"]
    assert yaml.safe_load(second["recipe"])["training"]["num_steps"] == 20
    assert sum(second["processes"].values()) == 1 and re.fullmatch(r"[\d.]+\S*", second["packages"]["torch"])
    variables = {"SLURM_JOB_ID": "7", "NCCL_DEBUG": "INFO", "VLLM_API_KEY": "x", "SLURM_JWT": "y", "HOME": "/"}
    assert described_variables(variables) == {"NCCL_DEBUG": "INFO", "SLURM_JOB_ID": "7"}


def a_second_run(run: Path) -> Path:
    """Another run, whose folder holds less: an earlier version's, which was killed while it wrote."""
    other = run.parent / "second"
    other.mkdir(exist_ok=True)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[:12]
    (other / "metrics.jsonl").write_text("".join(lines) + '{"step": 13, "lo')
    (other / "run.yaml").write_text((run / "run.yaml").read_text().replace("num_steps: 20", "num_steps: 40"))
    return other


def test_the_report_has_all_that_is_known_of_runs_side_by_side(run: Path, tmp_path: Path) -> None:
    result = {"model": "hf", "benchmark": "sums", "accuracy": 0.625, "interval": [0.5, 0.75], "num_problems": 64}
    for folder in (run / "evaluation_step_00000020", run.parent / "scores"):
        folder.mkdir(exist_ok=True)
        (folder / "results.json").write_text(json.dumps({"models": [result | {"recurrences": None}]}))
    page = tmp_path / "report.html"
    a_second_run(run)
    write_report(ReportOptions([run.parent], output=page, x="tokens", samples=3))
    text = page.read_text()
    assert text.count("62.5% [50.0, 75.0]") == 2, "in the folder of a run, and beside those of the runs"
    for expected in (
        "<h1>first, second</h1>", "finished", "20 of 20", "first: loss_thinking", "second: validation_loss",
        "<td>5,120</td>", "b&lt;i&gt;", "epochs", "checkpoint of step",
        "--run.time_limit_min=0", "<b>thinking</b>", "training.num_steps</td><td>20</td><td>40", "megatron-core",
    ):  # fmt: skip
        assert expected in text, expected
    assert "<i>" not in text.replace("<i></i>", "") and "<script" not in text
    assert "http" not in text.split("</style>")[1], "it needs no network"
    assert text.count("<details>") >= 3 + 2


def test_the_report_of_a_run_that_has_not_begun_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text("data: {train: [{path: /gone}]}\n")
    write_report(ReportOptions([tmp_path], output=tmp_path / "report.html"))
    assert "<h1>run</h1>" in (tmp_path / "report.html").read_text()


@needs_chromium
def test_the_report_fits_a_phone_and_a_desktop(run: Path, tmp_path: Path) -> None:
    page_path = tmp_path / "report.html"
    write_report(ReportOptions([run, a_second_run(run)], output=page_path))

    async def visit(page: Page) -> None:
        for name, width, columns in (("phone", 390, 1), ("desktop", 1280, 2)):
            await page.open(page_path.as_uri(), width, 900)
            await page.wait_for("first: loss", "Composition of the data", "Recipes")
            assert await page.value("document.documentElement.scrollWidth") <= width, "it is scrolled sideways"
            grid = "getComputedStyle(document.querySelector('.charts')).gridTemplateColumns"
            assert len((await page.value(grid)).split()) >= columns
            drawn = "document.querySelector('svg path').getBoundingClientRect().width"
            assert await page.value(drawn) > 200
            assert await page.value("getComputedStyle(document.querySelector('svg path')).stroke") == "rgb(0, 114, 178)"
            await page.picture(Path(PICTURES or tmp_path) / f"report-{name}.png")

    browse(tmp_path, visit)


@needs_chromium
def test_tensorboard_shows_the_charts_the_recipe_and_the_hyper_parameters(run: Path, tmp_path: Path) -> None:
    port = free_port()
    options = [f"--logdir={run.parent}", f"--port={port}", "--host=127.0.0.1", "--load_fast=false"]
    with (tmp_path / "tensorboard.txt").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-m", "tensorboard.main", *options], stdout=log, stderr=log)

    async def visit(page: Page) -> None:
        for tab, words, lines in (
            ("custom_scalars", ["Losses", "training and validation", "by source", "14 16 18 20"], 12),
            ("hparams", ["training.global_batch_size", "validation_loss"], 0),
            ("text", ["recipe", "global_batch_size: 8"], 0),
        ):
            await page.open(f"http://127.0.0.1:{port}/?darkMode=false#{tab}", 1280, 1600)
            await page.wait_for(*words)
            await page.wait_for_elements(".render-area path.line[d*=L]", lines)
            await page.picture(Path(PICTURES or tmp_path) / f"tensorboard-{tab}.png", whole=False)

    try:
        wait_for_server(port, server)
        browse(tmp_path, visit)
    finally:
        server.terminate()
        server.wait()


def wait_for_server(port: int, server: subprocess.Popen) -> None:
    while True:
        assert server.poll() is None
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)


def written(tmp_path: Path, **logging: Any) -> MetricsWriter:
    raw = {"run": {"output_dir": str(tmp_path / "run")}, "logging": {"tensorboard": False} | logging}
    (tmp_path / "run").mkdir(exist_ok=True)
    return MetricsWriter(recipe_from_dict(PretrainRecipe, raw), resumed_step=0)


def test_prometheus_reads_the_last_report_until_training_ends(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "collector"
    writer = written(tmp_path, prometheus_folder=str(folder))
    writer.write(1, {"loss": 2.5})
    assert "cannot be written (No such file or directory): will be retried" in capfd.readouterr().out
    folder.mkdir()
    writer.write(2, {"loss": 2.25, "source_loss/a": 2.0, "mfu": float("nan")})
    (path,) = folder.iterdir()
    assert path.suffix == ".prom"
    label = f'{{run="{tmp_path / "run"}"'
    lines = path.read_text().splitlines()
    assert f"megatron_tpt_loss{label}}} 2.25" in lines and f'megatron_tpt_source_loss{label},part="a"}} 2.0' in lines
    assert f"megatron_tpt_step{label}}} 2.0" in lines and not any("mfu" in line for line in lines)
    writer.close()
    assert not list(folder.iterdir())


def test_prometheus_text_groups_what_has_one_name_and_escapes_labels() -> None:
    text = prometheus_text({"tokens/a": 1.0, "loss": 2.0, 'tokens/b"\n\\': 3.0}, "r")
    assert text == (
        "# TYPE megatron_tpt_tokens gauge\n"
        'megatron_tpt_tokens{run="r",part="a"} 1.0\nmegatron_tpt_tokens{run="r",part="b\\"\\n\\\\"} 3.0\n'
        '# TYPE megatron_tpt_loss gauge\nmegatron_tpt_loss{run="r"} 2.0\n'
    )


@pytest.fixture
def wandb() -> Iterator[ModuleType]:
    """The package, which reads its settings anew in each test."""
    module = pytest.importorskip("wandb", reason="wandb is not installed (CONTRIBUTING.md says how)")
    yield module
    module.teardown()


def test_wandb_has_the_metrics_by_step(wandb: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    writer = written(tmp_path, wandb_project="p")
    writer.write(1, {"loss": 2.5})
    assert wandb.run.summary["loss"] == 2.5 and wandb.run.config["run"]["seed"] == 1234
    writer.close()
    assert list((tmp_path / "run/wandb").glob("offline-run-*"))


def test_wandb_without_a_key_is_refused_in_one_line(
    wandb: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where a key might be
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"logging\.wandb_project=p: .*; WANDB_MODE=offline writes to"):
        written(tmp_path, wandb_project="p")


def test_trackio_has_the_metrics_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="trackio is not installed (CONTRIBUTING.md says how)")
    for step, loss in ((1, 2.5), (2, 2.25)):  # the second is a resume
        writer = written(tmp_path, trackio_project="p")
        writer.write(step, {"loss": loss})
        writer.close()
    [run] = trackio.Api().runs("p")
    assert run.config["run.seed"] == 1234
    rows = trackio.sqlite_storage.SQLiteStorage.get_logs("p", run.name)
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 2.5), (2, 2.25)]


def test_hyper_parameters_are_flat_and_set() -> None:
    recipe = recipe_from_dict(PretrainRecipe, {"data": {"train": "a"}})
    found = hyper_parameters(recipe)
    assert found["optimizer.learning_rate"] == recipe.optimizer.learning_rate and "run.time_limit_min" not in found
    assert all(isinstance(value, int | float | str) and value is not True for value in found.values())


def test_a_chart_has_the_metrics_that_its_expressions_begin() -> None:
    names = ["step", "loss", "loss_document", "validation_loss", "validation_loss/a", "depth_loss/1"]
    assert metrics_of_chart(CHARTS["Losses"]["training and validation"], names) == ["loss", "validation_loss"]
    assert metrics_of_chart(CHARTS["Depth"]["loss by iterations"], names) == ["depth_loss/1"]
    assert metrics_of_chart(CHARTS["Reinforcement learning"]["reward"], ["reward", "reward/length"]) == [
        "reward", "reward/length"
    ]  # fmt: skip
