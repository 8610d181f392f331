"""A run's scalars: checked, averaged, shown, and kept as JSON lines and TensorBoard."""

import collections
import contextlib
import functools
import io
import json
import logging
import math
import pathlib
import sys
import time

import jax
import numpy as np
from PIL import Image
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from dit_jax import sharding
from dit_jax.errors import UserFileError
from dit_jax.system import files
from dit_jax.workdirs import metric_lines

logger = logging.getLogger("dit_jax")

# Steps that the host may run ahead of the devices: enough to keep them busy, few enough that the
# batches waiting for them fit.
MAX_STEPS_AHEAD = 8


class MetricWriter:
    """Writes `metrics.jsonl` and `tensorboard/` in the workdir, from the first process only.

    A run that resumes at `first_step` first drops what an earlier, killed one wrote beyond it.
    Where one of them is removed or replaced meanwhile, the next values go to a new one.
    Raises: OSError, at whatever is written, if it cannot be; `files.LostError` if the workdir was
      moved, also where another of its name lies there now.
    """

    def __init__(self, workdir: pathlib.Path, first_step: int):
        self._active = jax.process_index() == 0
        self._workdir = workdir
        if not self._active:
            return
        with self._errors():
            self._home = files.Directory(workdir)
            path = self._path = workdir / "metrics.jsonl"
            if path.exists():
                kept = [
                    line for line in metric_lines.read_lines(path) if line["step"] <= first_step
                ]
                text = "".join(json.dumps(line) + "\n" for line in kept)
                contents = text.encode()
                if path.stat().st_size != len(contents) or contents != path.read_bytes():
                    files.replace_text(path, text)
            self._open()
            # TensorBoard too forgets what was beyond.
            self._event(first_step + 1, session_log=SessionLog(status=SessionLog.START))

    def _open(self):
        self._file = self._path.open("a")
        directory = self._workdir / "tensorboard"
        directory.mkdir(exist_ok=True)
        self._directory = files.Directory(directory)
        # tensorboardX's SummaryWriter writes in a thread: when that dies of a full disk the run
        # would stand still at the next value.
        self._events = EventsWriter(str(directory / "events"))

    def _open_again_if_lost(self):
        self._home.check()  # Orbax makes a directory of the old name while it ends a checkpoint
        if not files.is_at(self._file, self._path):
            lost = self._path
        elif not self._directory.is_there():
            lost = self._directory.path
        else:
            return
        self._file.close()
        self._events.close()
        self._open()
        logger.warning("%s was removed or replaced: what follows is in a new one", lost)

    @contextlib.contextmanager
    def _errors(self):
        try:
            yield
        except files.LostError:
            raise
        except OSError as error:
            raise UserFileError(
                f"cannot write metrics to {self._workdir}: {error}\n"
                "Free space or give permission there, then run the same command."
            ) from error

    def _event(self, step, **content):
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))
        self._events.flush()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One JSON line {'step': step, **values}, and a TensorBoard scalar for each value.

        In all processes alike; where the first cannot write, all of them raise.
        """
        sharding.in_every_process(functools.partial(self._write_scalars, step, values))

    def _write_scalars(self, step, values):
        if not self._active:
            return
        with self._errors():
            self._open_again_if_lost()
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            scalars = [Summary.Value(tag=name, simple_value=v) for name, v in values.items()]
            self._event(step, summary=Summary(value=scalars))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes [H, W, 3] uint8 to `<name>/<step>.png` in the workdir, and to TensorBoard.

        In all processes alike, as `scalars`.
        """
        sharding.in_every_process(functools.partial(self._write_image, step, name, image))

    def _write_image(self, step, name, image):
        if not self._active:
            return
        png = io.BytesIO()
        Image.fromarray(image).save(png, "PNG")
        height, width, _ = image.shape
        encoded = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=png.getvalue()
        )
        with self._errors():
            self._open_again_if_lost()
            path = self._workdir / name / f"{step}.png"
            path.parent.mkdir(exist_ok=True)
            files.replace(path, lambda file: file.write(png.getvalue()))
            self._event(step, summary=Summary(value=[Summary.Value(tag=name, image=encoded)]))

    def close(self) -> None:
        if self._active:
            with self._errors():
                self._file.close()
                self._events.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self.close()
        except OSError:
            if kind is None:  # else what is on its way up says more
                raise


class Progress:
    """The scalars of finished steps, fetched without making the devices wait, and their display.

    On a terminal a progress bar; elsewhere one log line per report.

    Args: window, as `window` returned it: the steps since the last report before `first_step`.
    """

    def __init__(
        self, first_step: int, total_steps: int, batch_size: int, window: dict | None = None
    ):
        self._step, self._total_steps = first_step, total_steps
        self._batch_size = batch_size
        self._pending = collections.deque()  # device scalars of the newest steps
        # Of the steps since the last report: how many, and the sum of each scalar.
        window = window or {"steps": 0, "sums": {}}
        self._num_steps, self._sums = window["steps"], dict(window["sums"])
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
        """Takes the scalars of the next step, on the devices and perhaps not computed yet.

        Raises: FloatingPointError if a step was not finite, at most MAX_STEPS_AHEAD steps later.
        """
        self._step += 1
        self._pending.append(scalars)
        if self._clock is None:  # the first step compiles: it is not timed
            jax.block_until_ready(scalars)
            self._clock, self._timed_steps = time.monotonic(), 0
            self._bar.unpause()
        else:
            self._timed_steps += 1
        self._check_all_but(MAX_STEPS_AHEAD)
        self._bar.update()

    def check(self) -> None:
        """Waits for all steps so far.

        Raises: FloatingPointError at the first step that is not finite.
        """
        self._check_all_but(0)

    def _check_all_but(self, newest):
        while len(self._pending) > newest:
            step = self._step - len(self._pending) + 1
            scalars = jax.device_get(self._pending.popleft())
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
            self._num_steps += 1
            self._sums = {name: self._sums.get(name, 0.0) + v for name, v in values.items()}

    def window(self) -> dict:
        """Returns the finished steps since the last report: JSON, the same in every process."""
        return {"steps": self._num_steps, "sums": self._sums}

    def report(self) -> dict[str, float]:
        """Means over the steps since the last report, and img_per_s; shows them."""
        self.check()
        now = time.monotonic()
        means = {name: total / self._num_steps for name, total in self._sums.items()}
        rate = self._timed_steps / max(now - self._clock, 1e-9)
        if self._timed_steps:
            means["img_per_s"] = rate * self._batch_size
        self._num_steps, self._sums = 0, {}
        self._clock, self._timed_steps = now, 0
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
        self._bar.unpause()


def format_values(values: dict[str, float]) -> str:
    """'loss 0.1234  grad_norm 0.56'."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())
