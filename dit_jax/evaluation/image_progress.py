"""Progress of an evaluation: a bar on a terminal, otherwise lines in the log."""

import logging
import time

from tqdm import tqdm

logger = logging.getLogger("dit_jax")
LOG_EVERY_SECONDS = 60  # if there is no bar


class ImageProgress:
    """Shows the number of finished images, their rate and the time left.

    Args: show_bar, whether to show a bar; otherwise a line is logged every minute.
    """

    def __init__(self, total: int, num_done: int, show_bar: bool, name: str = "samples"):
        self._bar = tqdm(total=total, initial=num_done, desc=name, unit="img", disable=not show_bar)
        self._name, self._total, self._num_done = name, total, num_done
        self._num_at_start = None  # the images that were done when the timing began
        self._start_time = self._log_time = None

    def __enter__(self) -> "ImageProgress":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def update(self, count: int) -> None:
        """Adds `count` finished images."""
        self._bar.update(count)
        self._num_done += count
        now = time.monotonic()
        # The first images waited for compilation, so the rate is that of the later ones.
        if self._start_time is None:
            self._start_time = self._log_time = now
            self._num_at_start = self._num_done
        elif self._bar.disable and now - self._log_time >= LOG_EVERY_SECONDS:
            self._log_time = now
            rate = (self._num_done - self._num_at_start) / (now - self._start_time)
            left = tqdm.format_interval((self._total - self._num_done) / rate)
            logger.info(
                "%s %d/%d  %.4g img/s  %s left", self._name, self._num_done, self._total, rate, left
            )
