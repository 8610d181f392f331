"""The EMA parameters of a run's best step, by config.checkpoint_best_metric."""

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

LARGER_IS_BETTER = ("eval_psnr",)  # smaller values are better for all other metrics of training
# The form of the settings that `sample_distance.compile_distance` returns.
DISTANCE_SETTINGS = {
    "sample": schemas.object_of({}),
    "fid": schemas.object_of({}),
    "extractor": schemas.object_of({}),
    "reference": schemas.optional(schemas.is_string),
}
# The form of the values that are saved with the checkpoint.
SAVED_VALUES = {"metric": schemas.is_string, "value": schemas.is_number, **DISTANCE_SETTINGS}


class Best:
    """DIR/best, a workdir with one checkpoint; `sample` and `evaluate` load it like any other.

    Without config.checkpoint_best_metric nothing is kept.
    Args:
      data: identities of the run's data, for `workdirs.write_data`.
      distance_settings: from `sample_distance.compile_distance`; {} if no distance is measured.
    Raises: ValueError for a metric that the run does not measure.
    """

    def __init__(
        self, workdir: pathlib.Path, config: ConfigDict, data: dict, distance_settings: dict
    ):
        self._metric = config.checkpoint_best_metric
        self._config, self._data, self._workdir = config, data, workdir / "best"
        if not self._metric:
            return
        _check(config)
        saved = checkpoint.saved_values(self._workdir)
        if saved and (invalid := schemas.list_invalid_keys(saved, SAVED_VALUES, DISTANCE_SETTINGS)):
            logger.warning("cannot read how %s was chosen: %s", self._workdir, ", ".join(invalid))
            saved = {"metric": ""}  # not empty, because there is a checkpoint
        if "sample" in saved:  # an older version may have written it
            saved["sample"] = workdirs.upgrade_sample(saved["sample"])
        if saved:
            workdirs.check_config(self._workdir, config)
        # The values of this metric are comparable if they have the same settings.
        self._settings = {"metric": self._metric}
        if not self._metric.startswith("eval_"):  # held-out losses depend on no distance
            self._settings |= distance_settings
        comparable = saved.get("metric") == self._metric
        comparable = comparable and not sample_distance.describe_changes(saved, self._settings)
        self._value = saved.get("value") if comparable else None
        if saved and not comparable:
            logger.info("%s was chosen by another measure: it begins again", self._workdir)

    def update(self, step: int, values: dict[str, float], ema_params) -> None:
        """Saves the parameters if the metric is among the values, and better than ever before.

        Raises: OSError if they cannot be written; the earlier best parameters stay.
        """
        if not self._metric or self._metric not in values:
            return
        value = values[self._metric]
        sign = -1 if self._metric in LARGER_IS_BETTER else 1
        is_better = self._value is None or sign * value < sign * self._value
        if not is_better or not math.isfinite(value):  # the first value may be NaN
            return
        saved = {**self._settings, "value": value, "data": self._data}
        checkpoint.replace_params(self._workdir, self._config, ema_params, step, saved)
        self._value = value
        logger.info("best so far: step %d, %s %.4g", step, self._metric, value)


def _check(config):
    """Raises ValueError unless the run measures config.checkpoint_best_metric."""
    metric, distance = config.checkpoint_best_metric, config.get("fid")
    held_out = ["eval_loss"]
    if config.model.name == "vae":
        held_out += LARGER_IS_BETTER
    measured = []
    if distance and distance.every_steps:
        measured.append(sample_distance.training_name(config))
    if config.eval_every_steps and config.data.eval_split:
        measured += held_out
    if metric not in measured:
        raise UserError(
            f"checkpoint_best_metric={metric!r} is not measured in this run, which measures "
            f"{' and '.join(measured) or 'nothing'}. Set eval_every_steps and data.eval_split for "
            f"{' and '.join(held_out)}; set fid.every_steps for a distance such as fid5k."
        )
