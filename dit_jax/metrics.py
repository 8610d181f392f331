"""A run's scalars: checked, averaged, shown, and kept as JSON lines and TensorBoard."""

import contextlib
import json
import logging
import math
import pathlib
import sys
import time

import jax
import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

logger = logging.getLogger("dit_jax")

# Steps that the host may run ahead of the devices: enough to keep them busy, few enough that the
# batches waiting for them fit.
MAX_STEPS_AHEAD = 8


class MetricWriter:
    """Writes `metrics.jsonl` and `tensorboard/` in the workdir, from the first process only.

    A run that resumes at `first_step` first drops what an earlier, killed one wrote beyond it.
    The first means after it are of the steps since `first_step` alone.
    """

    def __init__(self, workdir: pathlib.Path, first_step: int):
        self._active = jax.process_index() == 0
        self._workdir = workdir
        if not self._active:
            return
        path = workdir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if _step(line) <= first_step]
        if kept != lines:
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(kept))
            temporary.rename(path)
        self._file = path.open("a", buffering=1)
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One JSON line {'step': step, **values}, and a TensorBoard scalar for each value."""
        if not self._active:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes [H, W, 3] uint8 to `<name>/<step>.png` in the workdir, and to TensorBoard."""
        if not self._active:
            return
        path = self._workdir / name / f"{step}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
        self._tensorboard.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        if self._active:
            self._file.close()
            self._tensorboard.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _step(line):
    """The step of a JSON line; a line cut short by a kill counts as beyond every step."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return float("inf")


def training_speed(workdir: pathlib.Path, step: int, batch_size: int) -> dict[str, float]:
    """'img_per_s' and 'seconds' of training up to a step, by metrics.jsonl, without compiling.

    Both are None where nothing up to that step was timed.
    """
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    reports = [line for line in lines if "img_per_s" in line and line["step"] <= step]
    begins = [0, *(line["step"] for line in reports)]
    images = [
        (line["step"] - begin) * batch_size for line, begin in zip(reports, begins, strict=False)
    ]
    if not reports:
        return {"img_per_s": None, "seconds": None}
    seconds = sum(n / line["img_per_s"] for n, line in zip(images, reports, strict=True))
    return {"img_per_s": sum(images) / seconds, "seconds": seconds}


class Progress:
    """The scalars of finished steps, fetched without making the devices wait, and their display.

    On a terminal a progress bar; elsewhere one log line per report.
    """

    def __init__(self, first_step: int, total_steps: int, batch_size: int):
        self._step, self._total_steps = first_step, total_steps
        self._batch_size = batch_size
        self._pending = []  # device scalars of the newest steps
        self._window = []  # host scalars since the last report
        self._finite = {}
        self._clock = self._timed_steps = None
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            disable=jax.process_index() != 0 or not sys.stderr.isatty(),
        )
        self._redirect = logging_redirect_tqdm([logging.getLogger("dit_jax")])

    def __enter__(self) -> "Progress":
        self._redirect.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._redirect.__exit__(*exception)
        self._bar.close()

    def append(self, scalars: dict[str, jax.Array]) -> None:
        """Takes the scalars of the next step, on the devices and perhaps not computed yet."""
        self._step += 1
        self._pending.append(scalars)
        if self._clock is None:  # the first step compiles: it is not timed
            jax.block_until_ready(scalars)
            self._clock, self._timed_steps = time.monotonic(), 0
        else:
            self._timed_steps += 1
        if len(self._pending) > MAX_STEPS_AHEAD:
            jax.block_until_ready(self._pending[-1 - MAX_STEPS_AHEAD])
        self._bar.update()

    def check(self) -> None:
        """Waits for all steps so far.

        Raises: FloatingPointError at the first step that is not finite.
        """
        steps = range(self._step - len(self._pending) + 1, self._step + 1)
        for step, scalars in zip(steps, jax.device_get(self._pending), strict=True):
            values = {name: float(value) for name, value in scalars.items()}
            if not all(map(math.isfinite, values.values())):
                raise FloatingPointError(
                    f"step {step} is not finite: {format_values(values)}\n"
                    f"Last finite step: {format_values(self._finite) or 'none'}\n"
                    "Training stops; this state is not saved and earlier checkpoints are intact. "
                    "In a new workdir, try a lower optim.learning_rate, optim.grad_clip_norm=1, "
                    "optim.warmup_steps, or model.dtype=float32."
                )
            self._finite = values
            self._window.append(values)
        self._pending = []

    def report(self) -> dict[str, float]:
        """Means over the steps since the last report, and img_per_s; shows them."""
        self.check()
        now = time.monotonic()
        means = {name: _mean(values[name] for values in self._window) for name in self._window[0]}
        rate = self._timed_steps / max(now - self._clock, 1e-9)
        if self._timed_steps:
            means["img_per_s"] = rate * self._batch_size
        self._window, self._clock, self._timed_steps = [], now, 0
        shown = f"loss {means['loss']:.4f}  {means.get('img_per_s', 0):.0f} img/s"
        self._bar.set_postfix_str(shown)
        if self._bar.disable:
            left = (self._total_steps - self._step) / rate if rate else 0
            steps = f"step {self._step}/{self._total_steps}"
            logger.info("%s  %s  %s left", steps, shown, tqdm.format_interval(left))
        return means

    @contextlib.contextmanager
    def paused(self):
        """Checks the steps so far; what is done inside does not count as training time."""
        self.check()
        began = time.monotonic()
        yield
        self._clock += time.monotonic() - began


def format_values(values: dict[str, float]) -> str:
    """'loss 0.1234  grad_norm 0.56'."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def _mean(values):
    values = list(values)
    return sum(values) / len(values)
