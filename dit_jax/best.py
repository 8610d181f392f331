"""The best step of a run by a named metric: its EMA parameters, in a workdir of their own."""

import logging
import pathlib

from ml_collections import ConfigDict

from dit_jax import checkpoint, measures

logger = logging.getLogger("dit_jax")

LARGER_IS_BETTER = ("eval_psnr",)  # of all else that training measures less is


class Best:
    """DIR/best, a workdir of one checkpoint, which `sample` and `evaluate` take as any other.

    Without config.checkpoint_best_metric nothing is kept.
    Raises: ValueError for a metric that the run does not measure.
    """

    def __init__(self, workdir: pathlib.Path, config: ConfigDict):
        self._metric = config.checkpoint_best_metric
        self._config, self._workdir = config, workdir / "best"
        if self._metric:
            _check(config)
            self._value = checkpoint.saved_values(self._workdir).get(self._metric)

    def update(self, step: int, values: dict[str, float], ema_params) -> None:
        """Keeps the parameters if the metric is among the values, and better than ever.

        Raises: OSError if they cannot be written; the best ones so far stay.
        """
        if not self._metric or self._metric not in values:
            return
        value, sign = values[self._metric], -1 if self._metric in LARGER_IS_BETTER else 1
        if self._value is not None and sign * value >= sign * self._value:
            return
        kept = {self._metric: value}
        checkpoint.replace_params(self._workdir, self._config, ema_params, step, kept)
        self._value = value
        logger.info("best so far: step %d, %s %.4g", step, self._metric, value)


def _check(config):
    metric, distances = config.checkpoint_best_metric, config.get("fid")
    known = []
    if distances and distances.every_steps:
        known.append(measures.training_name(config))
    held_out = metric.startswith("eval_") and config.eval_every_steps and config.data.eval_split
    if metric not in known and not held_out:
        raise ValueError(
            f"checkpoint_best_metric={metric!r} is not measured in this run: it can be "
            f"{' or '.join([*known, 'eval_loss'])}, of which the latter needs eval_every_steps and "
            "data.eval_split, and a distance fid.every_steps."
        )
