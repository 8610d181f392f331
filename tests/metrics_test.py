"""What is written, what is dropped on a resume, and which step is blamed."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax import metrics


def _lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_resume_drops_what_a_killed_run_wrote_beyond_its_checkpoint(tmp_path):
    with metrics.MetricWriter(tmp_path, 0) as writer:
        for step in (10, 20, 30):
            writer.scalars(step, {"loss": step / 10})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # killed while writing
    with metrics.MetricWriter(tmp_path, 20) as writer:
        writer.scalars(30, {"loss": 7.0})
    assert _lines(tmp_path) == [
        {"step": 10, "loss": 1.0},
        {"step": 20, "loss": 2.0},
        {"step": 30, "loss": 7.0},
    ]


def test_progress_reports_means_since_the_last_report():
    with metrics.Progress(0, 10, batch_size=4) as progress:
        for loss in (1.0, 2.0):
            progress.append({"loss": jnp.float32(loss)})
        assert progress.report()["loss"] == 1.5
        progress.append({"loss": jnp.float32(5.0)})
        report = progress.report()
    assert report["loss"] == 5.0
    assert report["img_per_s"] > 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_first_step_that_is_not_finite_is_named(bad):
    progress = metrics.Progress(100, 200, batch_size=4)
    for loss in (1.0, 0.5, bad, 7.0, bad):
        progress.append({"loss": jnp.float32(loss), "grad_norm": jnp.float32(2.0)})
    with pytest.raises(FloatingPointError, match=r"step 103 is not finite: .*loss (nan|inf)") as e:
        progress.check()
    assert "Last finite step: grad_norm 2  loss 0.5" in str(e.value)


def test_training_speed_weighs_the_reports_by_their_steps(tmp_path):
    with metrics.MetricWriter(tmp_path, 0) as writer:
        writer.scalars(10, {"loss": 1.0, "img_per_s": 100.0})
        writer.scalars(10, {"eval_loss": 1.0})
        writer.scalars(40, {"loss": 1.0, "img_per_s": 300.0})
        writer.scalars(50, {"loss": 1.0, "img_per_s": 1.0})
    speed = metrics.training_speed(tmp_path, step=40, batch_size=10)
    assert speed == pytest.approx({"seconds": 1 + 1, "img_per_s": 200.0})
