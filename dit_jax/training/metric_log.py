"""The log of a run's scalars: checks them, averages them, shows them and writes them to files."""

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

# The host may be this many steps ahead of the devices. More batches might not fit in memory.
MAX_STEPS_AHEAD = 8


class MetricWriter:
    """Writes `metrics.jsonl` and `tensorboard/` in the workdir, from the first process only.

    A run that resumes at `first_step` drops the values of later steps, which a killed run wrote. If
    `metrics.jsonl` or `tensorboard/` is removed or replaced, the next values go to a new one.
    Raises: OSError, from any method, if a write fails; `files.LostError` if the workdir was moved,
      even if another directory has its name now.
    """

    def __init__(self, workdir: pathlib.Path, first_step: int):
        self._active = jax.process_index() == 0
        self._workdir = workdir
        if not self._active:
            return
        with self._explain_errors():
            self._workdir_handle = files.Directory(workdir)
            path = self._path = workdir / "metrics.jsonl"
            # The file is rewritten only if it has lines that are damaged or after first_step.
            if path.exists():
                lines = metric_lines.read_lines(path)
                earlier = (line for line in lines if line["step"] <= first_step)
                text = "".join(json.dumps(line) + "\n" for line in earlier)
                if path.read_bytes() != text.encode():
                    files.replace_text(path, text)
            self._open()
            # TensorBoard then drops its values after first_step too.
            self._write_event(first_step + 1, session_log=SessionLog(status=SessionLog.START))

    def _open(self):
        self._file = self._path.open("a")
        directory = self._workdir / "tensorboard"
        directory.mkdir(exist_ok=True)
        self._directory = files.Directory(directory)
        # tensorboardX's SummaryWriter writes in a thread. If a full disk ended that thread, the run
        # would hang at the next value.
        self._events = EventsWriter(str(directory / "events"))

    def _open_again_if_lost(self):
        """Opens new files if one was removed or replaced.

        Raises: files.LostError if the workdir was moved.
        """
        # The workdir comes first: Orbax recreates a moved workdir when it completes a checkpoint.
        self._workdir_handle.check()
        if not files.is_at(self._file, self._path):
            lost = self._path
        elif not self._directory.is_there():
            lost = self._directory.path
        else:
            return
        self._file.close()
        self._events.close()
        self._open()
        logger.warning("%s was removed or replaced: the next values go to a new one", lost)

    @contextlib.contextmanager
    def _explain_errors(self):
        """Raises an OSError of the context with the workdir and the way out in its message."""
        try:
            yield
        except files.LostError:  # its message has the way out
            raise
        except OSError as error:
            raise UserFileError(
                f"cannot write metrics to {self._workdir}: {error}\n"
                "Free space or give permission there, then run the same command."
            ) from error

    def _write_event(self, step, **content):
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))
        self._events.flush()  # a killed run keeps its points

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes a JSON line {'step': step, **values}, and a TensorBoard scalar for each value.

        All processes must call this method. If the first cannot write, all of them raise.
        """
        sharding.in_every_process(functools.partial(self._write_scalars, step, values))

    def _write_scalars(self, step, values):
        if not self._active:
            return
        with self._explain_errors():
            self._open_again_if_lost()
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            scalars = [Summary.Value(tag=name, simple_value=v) for name, v in values.items()]
            self._write_event(step, summary=Summary(value=scalars))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes image [H, W, 3] uint8 to `<name>/<step>.png` in the workdir, and to TensorBoard.

        All processes must call this, as for `scalars`.
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
        with self._explain_errors():
            self._open_again_if_lost()
            path = self._workdir / name / f"{step}.png"
            path.parent.mkdir(exist_ok=True)
            files.replace(path, lambda file: file.write(png.getvalue()))
            self._write_event(step, summary=Summary(value=[Summary.Value(tag=name, image=encoded)]))

    def close(self) -> None:
        if self._active:
            with self._explain_errors():
                self._file.close()
                self._events.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self.close()
        except OSError:
            if kind is None:  # an earlier error says more
                raise


class Progress:
    """The scalars of finished steps, which the host fetches without making the devices wait.

    A terminal shows a progress bar; other outputs get one log line per report.
    Args: window, from the method `window` of the run that stopped at `first_step`.
    """

    def __init__(
        self, first_step: int, total_steps: int, batch_size: int, window: dict | None = None
    ):
        self._step, self._total_steps = first_step, total_steps
        self._batch_size = batch_size
        self._pending = collections.deque()  # device scalars of the newest steps
        # The steps since the last report: their count, and the sum of each scalar.
        window = window or {"steps": 0, "sums": {}}
        self._num_steps, self._sums = window["steps"], dict(window["sums"])
        self._finite = {}  # scalars of the last finite step
        # Start and count of the timed steps since the last report; None until the first step.
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
        """Adds the scalars of the next step, which the devices may still be computing.

        Raises: FloatingPointError for a step that is not finite, at most MAX_STEPS_AHEAD steps
          later.
        """
        self._step += 1
        self._pending.append(scalars)
        if self._clock is None:  # the first step compiles, so it is not timed
            jax.block_until_ready(scalars)
            self._clock, self._timed_steps = time.monotonic(), 0
            self._bar.unpause()
        else:
            self._timed_steps += 1
        self.check(max_pending=MAX_STEPS_AHEAD)
        self._bar.update()

    def check(self, max_pending: int = 0) -> None:
        """Waits for all steps except the newest `max_pending`, and adds their scalars to the sums.

        Raises: FloatingPointError at the first step that is not finite.
        """
        while len(self._pending) > max_pending:
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
            # A new dictionary, because a checkpoint may still be writing the old one.
            self._sums = {name: self._sums.get(name, 0.0) + v for name, v in values.items()}

    def window(self) -> dict:
        """Returns the count and sums of the finished steps since the last report, as JSON."""
        return {"steps": self._num_steps, "sums": self._sums}

    def report(self) -> dict[str, float]:
        """Shows and returns the means over the steps since the last report, and img_per_s."""
        self.check()
        now = time.monotonic()
        means = {name: total / self._num_steps for name, total in self._sums.items()}
        rate = self._timed_steps / max(now - self._clock, 1e-9)
        if self._timed_steps:  # 0 if the only step was the first, which is not timed
            means["img_per_s"] = rate * self._batch_size
        self._num_steps, self._sums = 0, {}
        self._clock, self._timed_steps = now, 0
        shown = f"loss {means['loss']:.4f}  {means.get('img_per_s', 0):.0f} img/s"
        self._bar.set_postfix_str(shown)
        if self._bar.disable:  # no bar is shown
            seconds_left = (self._total_steps - self._step) / rate if rate else 0
            steps = f"step {self._step}/{self._total_steps}"
            logger.info("%s  %s  %s left", steps, shown, tqdm.format_interval(seconds_left))
        return means

    @contextlib.contextmanager
    def paused(self):
        """Checks all steps so far; time spent in the context is not training time."""
        self.check()
        began = time.monotonic()
        yield
        self._clock += time.monotonic() - began
        self._bar.unpause()


def format_values(values: dict[str, float]) -> str:
    """Returns values in one line: 'loss 0.1234  grad_norm 0.56'."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())
