"""The best step of a run by a metric of choice: its EMA parameters, in a workdir of their own."""

import logging
import math
import pathlib

from ml_collections import ConfigDict

from dit_jax import workdirs
from dit_jax.errors import UserError
from dit_jax.system import schemas
from dit_jax.training import sample_distance
from dit_jax.workdirs import checkpoint

logger = logging.getLogger("dit_jax")

LARGER_IS_BETTER = ("eval_psnr",)  # of all other metrics of training the smallest value is best
# The form of the settings of a distance that `sample_distance.compile_distance` returns.
DISTANCE = {
    "sample": schemas.object_of({}),
    "fid": schemas.object_of({}),
    "extractor": schemas.object_of({}),
    "reference": schemas.optional(schemas.is_string),
}
# The form of what is saved with the checkpoint.
SAVED = {"metric": schemas.is_string, "value": schemas.is_number, **DISTANCE}


class Best:
    """DIR/best, a workdir with one checkpoint, which `sample` and `evaluate` load like any other.

    Without config.checkpoint_best_metric nothing is kept.
    Args:
      data: identities of the run's data, for `workdirs.write_data`.
      measured_by: settings of a distance, as `sample_distance.compile_distance` returns them.
    Raises: ValueError for a metric that the run does not measure.
    """

    def __init__(self, workdir: pathlib.Path, config: ConfigDict, data: dict, measured_by: dict):
        self._metric = config.checkpoint_best_metric
        self._config, self._data, self._workdir = config, data, workdir / "best"
        if not self._metric:
            return
        _check(config)
        saved = checkpoint.saved_values(self._workdir)
        if saved and (wrong := schemas.list_invalid_keys(saved, SAVED, DISTANCE)):
            logger.warning("cannot read how %s was chosen: %s", self._workdir, ", ".join(wrong))
            saved = {"metric": ""}  # not empty, because there is a checkpoint
        if "sample" in saved:  # an older version may have written it
            saved["sample"] = workdirs.upgrade_sample(saved["sample"])
        if saved:
            workdirs.check_config(self._workdir, config)
        # Held-out losses do not depend on the settings of a distance.
        held_out = self._metric.startswith("eval_")
        self._how = {"metric": self._metric, **({} if held_out else measured_by)}
        same = saved.get("metric") == self._metric
        same = same and not sample_distance.describe_changes(saved, self._how)
        # A value that was measured with other settings is not comparable, so it is forgotten.
        self._value = saved.get("value") if same else None
        if saved and not same:
            logger.info("%s was chosen by other measures: it begins again", self._workdir)

    def update(self, step: int, values: dict[str, float], ema_params) -> None:
        """Keeps the parameters if the metric is among the values and is better than ever before.

        Raises: OSError if they cannot be written; the best ones so far stay.
        """
        if not self._metric or self._metric not in values:
            return
        value, sign = values[self._metric], -1 if self._metric in LARGER_IS_BETTER else 1
        better = self._value is None or sign * value < sign * self._value
        if not better or not math.isfinite(value):  # the first value may be NaN
            return
        saved = {**self._how, "value": value, "data": self._data}
        checkpoint.replace_params(self._workdir, self._config, ema_params, step, saved)
        self._value = value
        logger.info("best so far: step %d, %s %.4g", step, self._metric, value)


def _check(config):
    """Raises ValueError unless the run measures config.checkpoint_best_metric."""
    metric, distances = config.checkpoint_best_metric, config.get("fid")
    known = []
    if distances and distances.every_steps:
        known.append(sample_distance.training_name(config))
    held_out = ["eval_loss", *LARGER_IS_BETTER * (config.model.name == "vae")]
    if config.eval_every_steps and config.data.eval_split:
        known += held_out
    if metric not in known:
        raise UserError(
            f"checkpoint_best_metric={metric!r} is not measured in this run, but "
            f"{' and '.join(known) or 'nothing'}: {' and '.join(held_out)} with eval_every_steps "
            "and data.eval_split, and with fid.every_steps a distance such as fid5k."
        )
