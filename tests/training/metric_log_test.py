"""What is written, what is dropped on a resume, and which step is blamed."""

import json
import resource
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.close import assert_trees_close
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from dit_jax.system import files
from dit_jax.training import metric_log
from dit_jax.workdirs import metric_lines


def _lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_resume_drops_what_a_killed_run_wrote_beyond_its_checkpoint(tmp_path):
    with metric_log.MetricWriter(tmp_path, 0) as writer:
        for step in (10, 20, 30):
            writer.scalars(step, {"loss": step / 10})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # killed while writing
    with metric_log.MetricWriter(tmp_path, 20) as writer:
        writer.scalars(30, {"loss": 7.0})
    assert _lines(tmp_path) == [
        {"step": 10, "loss": 1.0},
        {"step": 20, "loss": 2.0},
        {"step": 30, "loss": 7.0},
    ]


@pytest.mark.parametrize("anew", [False, True])
def test_nothing_is_written_beside_a_workdir_that_was_moved(tmp_path, anew):
    """Orbax, which is writing a checkpoint, may have made one of the old name."""
    run = tmp_path / "run"
    run.mkdir()
    with metric_log.MetricWriter(run, 0) as writer:
        writer.scalars(10, {"loss": 1.0})
        moved = run.rename(tmp_path / "moved")
        if anew:
            (run / "checkpoints").mkdir(parents=True)
        with pytest.raises(files.LostError, match="run is gone"):
            writer.scalars(20, {"loss": 2.0})
        with pytest.raises(files.LostError, match="run is gone"):
            writer.image(20, "samples", np.zeros((8, 8, 3), np.uint8))
    assert [line["step"] for line in _lines(moved)] == [10]
    assert [path.name for path in run.glob("*")] == ["checkpoints"] * anew


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_values_after_a_loss_of_the_file_are_written(tmp_path, caplog, name, replace):
    with metric_log.MetricWriter(tmp_path, 0) as writer:
        writer.scalars(10, {"loss": 1.0})
        moved = (tmp_path / name).rename(tmp_path / "moved")
        if replace and name == "metrics.jsonl":
            (tmp_path / name).write_bytes(moved.read_bytes())
        elif replace:
            (tmp_path / name).mkdir()
        writer.scalars(20, {"loss": 2.0})
        writer.image(20, "samples", np.zeros((8, 8, 3), np.uint8))
        writer.scalars(30, {"loss": 3.0})
    saved = name == "tensorboard" or replace
    assert [line["step"] for line in _lines(tmp_path)] == ([10] if saved else []) + [20, 30]
    assert len(list((tmp_path / "tensorboard").iterdir())) >= 1
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / name} was removed or replaced: the next values go to a new one"
    ]


def test_damaged_lines_are_left_out_and_said(tmp_path, caplog):
    lines = [b'{"step": 10, "loss": 1.0}', b"\xff\xfe", b"[1]", b'{"loss": 2.0}', b'{"step": "a"}']
    lines += [b"[" * 100_000, b'{"step": 20, "loss": 3.0, "img_per_s": 4.0}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    assert metric_lines.training_speed(tmp_path, 20, 1)["img_per_s"] == 4.0
    with metric_log.MetricWriter(tmp_path, 20) as writer:
        writer.scalars(30, {"loss": 7.0})
    assert [line["step"] for line in _lines(tmp_path)] == [10, 20, 30]
    assert "5 damaged lines of" in caplog.text
    assert "the first is line 2" in caplog.text


@pytest.mark.parametrize("value", [0, -1.0, 1e400, 10**400, "fast", None, [1], {}, True], ids=str)
@pytest.mark.parametrize("key", ["img_per_s", "step", "loss"])
def test_lines_of_other_types_are_left_out_and_said(tmp_path, caplog, key, value):
    lines = [{"step": step, "loss": 1.0, "img_per_s": 4.0} for step in (10, 20, 30)]
    lines[1][key] = value
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    speed = metric_lines.training_speed(tmp_path, 30, batch_size=2)
    legal = {"loss": (0, -1.0, 1e400, None), "step": (0,), "img_per_s": ()}[key]
    if value in legal and value is not True:
        assert not caplog.records
        assert len(metric_lines.read_lines(path)) == 3
    else:
        assert speed == {"img_per_s": 4.0, "seconds": 15.0}
        expected_message = (
            f"1 damaged lines of {path} are left out, the first is line 2, with a wrong {key}."
        )
        assert expected_message in caplog.text


@pytest.mark.parametrize("steps", [(0,), (0, 0), ()], ids=str)
def test_no_step_was_timed(tmp_path, steps):
    lines = [json.dumps({"step": step, "img_per_s": 4.0}) + "\n" for step in steps]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    nothing = {"img_per_s": None, "seconds": None}
    assert metric_lines.training_speed(tmp_path, 30, batch_size=2) == nothing


def test_progress_reports_means_since_the_last_report():
    with metric_log.Progress(0, 10, batch_size=4) as progress:
        for loss in (1.0, 2.0):
            progress.append({"loss": jnp.float32(loss)})
        assert progress.report()["loss"] == 1.5
        progress.append({"loss": jnp.float32(5.0)})
        report = progress.report()
    assert report["loss"] == 5.0
    assert report["img_per_s"] > 0


def test_means_do_not_depend_on_where_a_run_was_interrupted():
    losses = [1 / 3, 0.1, 1e-3, 7.7]

    def append(progress, losses):
        for loss in losses:
            progress.append({"loss": jnp.float32(loss)})

    with metric_log.Progress(0, 10, batch_size=4) as whole:
        append(whole, losses)
        mean = whole.report()["loss"]
    with metric_log.Progress(0, 10, batch_size=4) as first:
        append(first, losses[:3])
        first.check()
        window = json.loads(json.dumps(first.window()))
    with metric_log.Progress(3, 10, batch_size=4, window=window) as second:
        append(second, losses[3:])
        assert second.report()["loss"] == mean
        assert second.window() == {"steps": 0, "sums": {}}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_first_step_that_is_not_finite_is_named(bad):
    def append(progress, losses):
        for loss in losses:
            progress.append({"loss": jnp.float32(loss), "grad_norm": jnp.float32(2.0)})

    first = metric_log.Progress(100, 200, batch_size=4)
    append(first, (1.0, 0.5, bad, 7.0, bad))
    with pytest.raises(FloatingPointError, match=r"step 103 is not finite: .*loss (nan|inf)") as e:
        first.check()
    assert "Last finite step: grad_norm 2  loss 0.5" in str(e.value)

    # Without a report or a checkpoint it is seen too, as soon as the run-ahead allows.
    second = metric_log.Progress(0, 200, batch_size=4)
    append(second, [1.0, bad] + (metric_log.MAX_STEPS_AHEAD - 1) * [1.0])
    with pytest.raises(FloatingPointError, match="step 2 is not finite"):
        append(second, [1.0])


def test_training_speed_weighs_the_reports_by_their_steps(tmp_path):
    with metric_log.MetricWriter(tmp_path, 0) as writer:
        writer.scalars(10, {"loss": 1.0, "img_per_s": 100.0})
        writer.scalars(10, {"eval_loss": 1.0})
        writer.scalars(40, {"loss": 1.0, "img_per_s": 300.0})
        writer.scalars(50, {"loss": 1.0, "img_per_s": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "lo')  # killed while writing
    speed = metric_lines.training_speed(tmp_path, step=40, batch_size=10)
    assert_trees_close(speed, {"seconds": 1 + 1, "img_per_s": 200.0}, 1e-6)


def _events(path):
    """The records of a TFRecord file: length, its checksum, bytes, their checksum."""
    content = path.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def test_tensorboard_holds_the_same_and_forgets_what_was_beyond(tmp_path):
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    with metric_log.MetricWriter(tmp_path, 20) as writer:
        writer.scalars(30, {"loss": 0.5, "grad_norm": 2.0})
        writer.image(30, "samples", image)
        (path,) = (tmp_path / "tensorboard").iterdir()
        _, start, scalars, picture = _events(path)  # on the disk at once
    assert start.session_log.status == start.session_log.START
    assert start.step == 21
    assert scalars.step == picture.step == 30
    assert {v.tag: v.simple_value for v in scalars.summary.value} == {"loss": 0.5, "grad_norm": 2}
    png = picture.summary.value[0].image.encoded_image_string
    assert png == (tmp_path / "samples" / "30.png").read_bytes()
    np.testing.assert_array_equal(Image.open(tmp_path / "samples" / "30.png"), image)


def test_full_disk_is_an_error_at_once(tmp_path):
    def write():
        with metric_log.MetricWriter(tmp_path, 0) as writer:
            for step in range(100):
                writer.scalars(step, {"loss": 1.0, "a_long_name_that_fills_the_file": 2.0})

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # no file may be larger
    try:
        with pytest.raises(OSError, match=rf"cannot write metrics to {tmp_path}: .*\nFree space"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
