"""The scalars of a run: checked, averaged, shown, and written as JSON lines and to TensorBoard."""

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

# Steps that the host may be ahead of the devices: enough to keep them busy, few enough for the
# waiting batches to fit in memory.
MAX_STEPS_AHEAD = 8


class MetricWriter:
    """Writes `metrics.jsonl` and `tensorboard/` in the workdir, from the first process only.

    A run that resumes at `first_step` first drops later values, which an earlier, killed run wrote.
    If one of the two is removed or replaced meanwhile, the next values go to a new one.
    Raises: OSError, from any method, if a write fails; `files.LostError` if the workdir was moved,
      even if another directory has its name now.
    """

    def __init__(self, workdir: pathlib.Path, first_step: int):
        self._active = jax.process_index() == 0
        self._workdir = workdir
        if not self._active:
            return
        with self._errors():
            self._home = files.Directory(workdir)
            path = self._path = workdir / "metrics.jsonl"
            # Lines up to first_step are kept; a file without other lines is not rewritten.
            if path.exists():
                lines = metric_lines.read_lines(path)
                earlier = (line for line in lines if line["step"] <= first_step)
                text = "".join(json.dumps(line) + "\n" for line in earlier)
                contents = text.encode()
                if path.stat().st_size != len(contents) or contents != path.read_bytes():
                    files.replace_text(path, text)
            self._open()
            # Makes TensorBoard drop what was beyond first_step too.
            self._event(first_step + 1, session_log=SessionLog(status=SessionLog.START))

    def _open(self):
        self._file = self._path.open("a")
        directory = self._workdir / "tensorboard"
        directory.mkdir(exist_ok=True)
        self._directory = files.Directory(directory)
        # tensorboardX's SummaryWriter writes in a thread. If a full disk ends that thread, the run
        # hangs at the next value.
        self._events = EventsWriter(str(directory / "events"))

    def _open_again_if_lost(self):
        """Opens new files if one was removed or replaced.

        Raises: files.LostError if the workdir was moved.
        """
        # First, because Orbax makes a new directory of the old name when it ends a checkpoint.
        self._home.check()
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
        """Makes an OSError name the workdir and what to do."""
        try:
            yield
        except files.LostError:  # says what to do already
            raise
        except OSError as error:
            raise UserFileError(
                f"cannot write metrics to {self._workdir}: {error}\n"
                "Free space or give permission there, then run the same command."
            ) from error

    def _event(self, step, **content):
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))
        self._events.flush()  # a killed run keeps its points

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes a JSON line {'step': step, **values}, and a TensorBoard scalar for each value.

        All processes must call this; if the first cannot write, all of them raise.
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
            if kind is None:  # otherwise the first error says more
                raise


class Progress:
    """The scalars of finished steps: fetched without making the devices wait, averaged, shown.

    They are shown by a progress bar on a terminal, elsewhere by one log line per report.
    Args: window, the result of `window` before the run stopped at `first_step`.
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
        # Start of the timed steps since the last report; None until the first step has compiled.
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
        """Takes the scalars of the next step, which the devices may still be computing.

        Raises: FloatingPointError if a step was not finite, at most MAX_STEPS_AHEAD steps later.
        """
        self._step += 1
        self._pending.append(scalars)
        if self._clock is None:  # the first step compiles, so it is not timed
            jax.block_until_ready(scalars)
            self._clock, self._timed_steps = time.monotonic(), 0
            self._bar.unpause()
        else:
            self._timed_steps += 1
        self._check_all_but(MAX_STEPS_AHEAD)  # so the host waits for older steps only
        self._bar.update()

    def check(self) -> None:
        """Waits for all steps so far.

        Raises: FloatingPointError at the first step that is not finite.
        """
        self._check_all_but(0)

    def _check_all_but(self, newest):
        """Waits for all steps but the `newest`, and adds their scalars to the sums.

        Raises: FloatingPointError at the first step that is not finite.
        """
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
        """Returns the count and sums of the finished steps since the last report, as JSON.

        They are the same in every process.
        """
        return {"steps": self._num_steps, "sums": self._sums}

    def report(self) -> dict[str, float]:
        """Returns the means over the steps since the last report, and img_per_s; shows them."""
        self.check()
        now = time.monotonic()
        means = {name: total / self._num_steps for name, total in self._sums.items()}
        rate = self._timed_steps / max(now - self._clock, 1e-9)
        if self._timed_steps:  # not if the first step, which compiles, was the only one
            means["img_per_s"] = rate * self._batch_size
        self._num_steps, self._sums = 0, {}
        self._clock, self._timed_steps = now, 0
        shown = f"loss {means['loss']:.4f}  {means.get('img_per_s', 0):.0f} img/s"
        self._bar.set_postfix_str(shown)
        if self._bar.disable:  # no bar is shown
            left = (self._total_steps - self._step) / rate if rate else 0
            steps = f"step {self._step}/{self._total_steps}"
            logger.info("%s  %s  %s left", steps, shown, tqdm.format_interval(left))
        return means

    @contextlib.contextmanager
    def paused(self):
        """Checks the steps so far; the time spent inside does not count as training time."""
        self.check()
        began = time.monotonic()
        yield
        self._clock += time.monotonic() - began  # as if the training steps had begun later
        self._bar.unpause()


def format_values(values: dict[str, float]) -> str:
    """Returns values in one line: 'loss 0.1234  grad_norm 0.56'."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())
