"""Progress of images that are measured: a bar on a terminal, else lines in the log."""

import logging
import time

from tqdm import tqdm

logger = logging.getLogger("dit_jax")
LOG_EVERY_SECONDS = 60  # if there is no terminal


class ImageProgress:
    """Number of images done, their rate and the time left.

    Shown as a bar, or as a line in the log every minute.
    """

    def __init__(self, total: int, done: int, bar: bool, name: str = "samples"):
        self._bar = tqdm(total=total, initial=done, desc=name, unit="img", disable=not bar)
        self._name, self._total, self._done = name, total, done
        self._began = self._logged = None  # times

    def __enter__(self) -> "ImageProgress":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def update(self, count: int) -> None:
        """Counts images that are done.

        The first call is not timed, since its images waited for compilation.
        """
        self._bar.update(count)
        self._done += count
        now = time.monotonic()
        if self._began is None:
            self._began = self._logged = now
            self._done_then = self._done
        elif self._bar.disable and now - self._logged >= LOG_EVERY_SECONDS:
            self._logged = now
            rate = (self._done - self._done_then) / (now - self._began)
            left = tqdm.format_interval((self._total - self._done) / rate)
            logger.info(
                "%s %d/%d  %.4g img/s  %s left", self._name, self._done, self._total, rate, left
            )
