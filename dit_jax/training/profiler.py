"""A profiler trace of a few training steps."""

import logging
import pathlib

import jax
from ml_collections import ConfigDict

from dit_jax.training import metric_log

logger = logging.getLogger("dit_jax")


class Profiler:
    """Traces `config.profile_num_steps` steps to DIR/profile, from `config.profile_start_step` on.

    It is a context manager, so that an error ends the trace. A resumed run cannot trace steps that
    are done.
    """

    def __init__(self, workdir: pathlib.Path, config: ConfigDict, first_step: int):
        self._directory = workdir / "profile"
        self._start = config.profile_start_step
        self._end = self._start + config.profile_num_steps - 1
        self._is_tracing = False
        if 0 < self._start <= first_step:
            logger.warning("step %d is done, so it is not profiled", self._start)

    def before_step(self, step: int) -> None:
        """Begins the trace if `step` is its first step."""
        if step == self._start:
            jax.profiler.start_trace(self._directory)
            self._is_tracing = True

    def after_step(self, step: int, progress: metric_log.Progress) -> None:
        """Ends the trace if `step` was its last step."""
        if self._is_tracing and step == self._end:
            # Pausing waits for the steps, so the trace is complete.
            with progress.paused():
                self._stop()

    def _stop(self):
        self._is_tracing = False
        jax.profiler.stop_trace()

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_) -> None:
        if self._is_tracing:
            self._stop()
