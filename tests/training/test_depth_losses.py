"""The callback and the report of examples/recurrence/smollm2.sh."""

import json
import sys
from pathlib import Path

import pytest
from training_runs import Train

from megatron_tpt.errors import UserError

EXAMPLE = Path(__file__).parents[2] / "examples/recurrence"


@pytest.fixture(autouse=True)
def example_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)


@pytest.mark.parametrize("depths", [[1, 2, 3], []], ids=["recurrent", "static"])
def test_losses_at_every_depth_are_measured_from_before_the_first_step_on(
    depths: list[int], train: Train, recipe: dict, index_prefix: Path
) -> None:
    model = {**recipe["model"], "num_layers": 3}
    if depths:
        model |= {"family": "recurrent", "mean_recurrences": 3, "backprop_recurrences": 2}
    metrics = train(
        "depths",
        changes={
            "model": model,
            "training": {**recipe["training"], "num_steps": 5, "validation_interval": 2, "validation_steps": 1},
            "data": {**recipe["data"], "validation": [str(index_prefix)]},
            "callbacks": {"depth_losses:DepthLosses": {"recurrences": depths} if depths else {}},
        },
    )
    names = [f"depth_validation_loss/{depth}" for depth in depths or [1]]
    rows = {row["step"]: row for row in metrics if names[0] in row}
    assert list(rows) == [0, 2, 4, 5]
    assert all(set(row) == {"step", *names} for row in rows.values())
    # The depth of the ordinary validation is 3, and its losses show that nothing else has changed.
    usual = {row["step"]: row["validation_loss"] for row in metrics if "validation_loss" in row}
    assert usual == {step: row[names[-1]] for step, row in rows.items() if step}
    assert len(set(rows[5].values())) == 1 + len(names)


def test_the_report_has_a_curve_for_every_depth_and_the_static_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import smollm2_report

    losses = {"recurrent": {"1": [3.0, 2.5], "2": [2.75, 2.25]}, "static": {"1": [3.0, 2.0]}}
    for run, depths in losses.items():
        lines = [{"step": 1, "loss": 9.0}]
        for place, step in enumerate((0, 25)):
            lines.append({"step": step} | {f"depth_validation_loss/{r}": values[place] for r, values in depths.items()})
        (tmp_path / run).mkdir()
        (tmp_path / run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(sys, "argv", ["smollm2_report.py", "--output", str(tmp_path)])
    smollm2_report.main()
    page = (tmp_path / "losses.md").read_text()
    assert "| step | r = 1 | r = 2 | static |" in page and "| 25 | 2.5000 | 2.2500 | 2.0000 |" in page
    assert "torch " in page and capsys.readouterr().out == page
    content = json.loads((tmp_path / "losses.json").read_text())
    assert content["losses"]["static"] == {"0": 3.0, "25": 2.0} and content["versions"]["megatron-core"]
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "static/metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="static: no validation losses there"):
        smollm2_report.main()
