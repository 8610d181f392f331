"""Workdirs: a directory is a run, its config the one that config.json in it holds."""

import json
import logging
import pathlib
import tempfile

import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from dit_jax import files, overrides, sharding

logger = logging.getLogger("dit_jax")

# A run may go on with other values of these: they do not change what is trained on what, up to
# rounding; total_steps also stretches a cosine schedule. A key that ends with a dot stands for all
# below it.
MAY_CHANGE = (
    "total_steps",
    "log_every_steps",
    "eval_every_steps",
    "sample_every_steps",
    "sample_num_images",
    "checkpoint_every_steps",
    "checkpoint_keep",
    "checkpoint_keep_every_steps",
    "checkpoint_best_metric",
    "profile_start_step",
    "profile_num_steps",
    "model.attention",
    "model.remat",
    "model.scan_unroll",
    "data.data_dir",
    "latents.vae",
    "latents.moments",
    "text.encoder",
    "autoencoder.lpips",
    "data.cache",
    "data.num_workers",
    "data.num_threads",
    "data.prefetch_batches",
    "mesh.",
    "sample.",
    "fid.",
)


def claim(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Makes the workdir, if it is not there, and demands that it belongs to a run of this config.

    Raises: ValueError as `check_config`; OSError if the directory cannot be written.
    """
    check_config(workdir, config)

    def make():
        (workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass

    sharding.in_first_process(make, f"cannot write to the workdir {workdir}")


def check_config(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Demands that what was trained in the workdir, if anything, was by this config.

    A digest that the config leaves empty is filled in by the run, so it differs from none.
    Raises: ValueError that lists the keys that differ and may not.
    """
    if saved_steps(workdir):  # before the first checkpoint nothing can be mixed up
        as_saved = ConfigDict(json.loads(json.dumps(config.to_dict())))  # tuples are lists there
        as_found = load_config(workdir)
        for either in (as_found, as_saved):
            overrides.expand_paths(either)
        saved, wanted = flatten(as_found), flatten(as_saved)
        differing = [
            f"  {key}: workdir {saved.get(key, 'none')!r}, now {wanted.get(key, 'none')!r}"
            for key in sorted(saved.keys() | wanted.keys())
            if saved.get(key) != wanted.get(key) and not _may_change(key, wanted)
        ]
        if differing:
            raise ValueError(
                f"{workdir} belongs to a run with another config:\n"
                + "\n".join(differing)
                + "\nChoose another --workdir, or restore these values."
            )
        lengths = saved["total_steps"], wanted["total_steps"]
        if lengths[0] != lengths[1] and wanted["optim.schedule"] == "cosine":
            logger.warning("total_steps was %d, now %d: so is the cosine schedule's end", *lengths)


def write_config(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Writes config.json, when all of the config has been found good.

    Raises: OSError.
    """

    def write():
        text = json.dumps(config.to_dict(), indent=2) + "\n"
        files.replace_text(workdir / "config.json", text)

    sharding.in_first_process(write, f"cannot write to the workdir {workdir}")


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """The steps of the complete checkpoints, ascending."""
    directory = workdir.absolute() / "checkpoints"
    return sorted(ocp.utils.checkpoint_steps(directory)) if directory.is_dir() else []


def load_config(workdir: pathlib.Path) -> ConfigDict:
    """The config of a workdir, locked; where config.json is lost, that of the newest checkpoint.

    Raises: FileNotFoundError if nothing was trained there; ValueError if no config can be read.
    """
    path = workdir / "config.json"
    saved = [
        workdir / "checkpoints" / str(step) / "config" / "metadata" for step in saved_steps(workdir)
    ]
    if not path.is_file() and not saved:
        raise FileNotFoundError(
            f"no {path}: {workdir} must be a directory that dit_jax.train has written, or "
            "dit_jax.convert."
        )
    for candidate in [path, *reversed(saved)]:
        try:
            return ConfigDict(json.loads(candidate.read_text())).lock()
        except (OSError, ValueError, TypeError, AttributeError) as error:
            logger.warning("cannot read %s: %s", candidate, error)
    raise ValueError(f"no config in {workdir} can be read; restore config.json from a copy.")


def flatten(config: ConfigDict, prefix: str = "") -> dict:
    """'model.depth' -> value for every key."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _may_change(key, wanted):
    if key.endswith("_digest") and wanted.get(key) == "":
        return True
    return key in MAY_CHANGE or key.partition(".")[0] + "." in MAY_CHANGE
