"""Orbax checkpoints in DIR/checkpoints/<step>, and the config that a workdir belongs to.

A checkpoint has the items params, ema_params, opt_state, data (the pipeline's state) and config.
"""

import contextlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

logger = logging.getLogger("dit_jax")

# A run may go on with other values of these: they do not change what is trained on what, up to
# rounding; total_steps also stretches a cosine schedule. A key that ends with a dot stands for all
# below it.
MAY_CHANGE = (
    "total_steps",
    "log_every_steps",
    "eval_every_steps",
    "sample_every_steps",
    "checkpoint_every_steps",
    "checkpoint_keep",
    "checkpoint_keep_every_steps",
    "profile_start_step",
    "profile_num_steps",
    "model.attention",
    "model.remat",
    "model.scan_unroll",
    "data.data_dir",
    "data.cache",
    "data.num_workers",
    "data.num_threads",
    "data.prefetch_batches",
    "mesh.",
    "sample.",
)
STATE_ITEMS = ("params", "ema_params", "opt_state")


def claim_workdir(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Makes the workdir and writes its config.json, or checks the one that is there.

    Raises: ValueError that lists the keys that differ and may not; OSError if the directory
      cannot be written.
    """
    path = workdir / "config.json"
    if path.exists() and _steps(workdir):  # before the first checkpoint nothing can be mixed up
        saved, wanted = _flatten(load_config(workdir)), _flatten(config)
        differing = [
            f"  {key}: workdir {saved.get(key, 'none')!r}, now {wanted.get(key, 'none')!r}"
            for key in sorted(saved.keys() | wanted.keys())
            if saved.get(key) != wanted.get(key) and not _may_change(key)
        ]
        if differing:
            raise ValueError(
                f"{workdir} belongs to a run with another config:\n"
                + "\n".join(differing)
                + "\nChoose another --workdir, or restore these values."
            )
    if jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
            os.replace(temporary, path)
        except OSError as error:
            raise OSError(f"cannot write to the workdir {workdir}: {error}") from error
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("claim_workdir")


def _steps(workdir):
    """The steps of the complete checkpoints, ascending."""
    directory = workdir.absolute() / "checkpoints"
    return sorted(ocp.utils.checkpoint_steps(directory)) if directory.is_dir() else []


def load_config(workdir: pathlib.Path) -> ConfigDict:
    """The config of a workdir, locked.

    Raises: FileNotFoundError if nothing was trained there.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}: --workdir must be a directory that dit_jax.train has written."
        )
    return ConfigDict(json.loads(path.read_text())).lock()


@contextlib.contextmanager
def open_manager(workdir: pathlib.Path, config: ConfigDict) -> Iterator[ocp.CheckpointManager]:
    """Orbax's manager of DIR/checkpoints: asynchronous, atomic, with the config's retention.

    On leaving, also by an error, what is being written is finished first.
    Raises: OSError then, if a checkpoint could not be written.
    """
    if config.checkpoint_keep < 2:
        raise ValueError(
            f"{config.checkpoint_keep=} must be at least 2, to have one to fall back on."
        )
    options = ocp.CheckpointManagerOptions(
        max_to_keep=config.checkpoint_keep,
        keep_period=config.checkpoint_keep_every_steps or None,
        cleanup_tmp_directories=True,
    )
    manager = ocp.CheckpointManager(workdir.absolute() / "checkpoints", options=options)
    try:
        yield manager
    finally:
        try:
            manager.wait_until_finished()
        except Exception as error:
            raise _write_error(manager, error) from error
        manager.close()


def save(manager: ocp.CheckpointManager, step: int, state, data_state: dict, config) -> None:
    """Begins to write checkpoint <step>; an earlier one still being written is awaited first.

    Raises: OSError if the earlier one could not be written.
    """
    items = {name: ocp.args.StandardSave(getattr(state, name)) for name in STATE_ITEMS}
    items["data"] = ocp.args.JsonSave(data_state)
    items["config"] = ocp.args.JsonSave(config.to_dict())
    try:
        manager.save(step, args=ocp.args.Composite(**items))
    except Exception as error:
        raise _write_error(manager, error) from error


def check_for_errors(manager: ocp.CheckpointManager) -> None:
    """Raises: OSError if a checkpoint could not be written since the last save."""
    try:
        manager.check_for_errors()
    except Exception as error:
        raise _write_error(manager, error) from error


def _write_error(manager, error):
    complete = sorted(ocp.utils.checkpoint_steps(manager.directory))
    kept = (
        f"the last complete one is step {complete[-1]}" if complete else "there is no earlier one"
    )
    return OSError(
        f"cannot write a checkpoint to {manager.directory}: {type(error).__name__}: {error}\n"
        f"Training stops; {kept}. Free space or permissions there, then run the same command."
    )


def restore_latest(manager: ocp.CheckpointManager, state):
    """(state, data_state) of the newest readable checkpoint, or None if there is none at all.

    Args: state, a tree of jax.ShapeDtypeStruct with the shardings to restore to.
    An unreadable checkpoint is moved to DIR/corrupt_checkpoints and the one before it is tried.
    Raises: OSError if there are checkpoints and none can be read.
    """
    errors = []
    for step in sorted(manager.all_steps(), reverse=True):
        items = {name: ocp.args.StandardRestore(getattr(state, name)) for name in STATE_ITEMS}
        items["data"] = ocp.args.JsonRestore()
        try:
            restored = manager.restore(step, args=ocp.args.Composite(**items))
        # Orbax, tensorstore and JSON each have their own exceptions for a damaged file.
        except Exception as error:
            errors.append(
                f"  step {step}: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
            )
            logger.warning(
                "checkpoint %d cannot be read, trying the one before:%s", step, errors[-1]
            )
            continue
        for corrupt in [s for s in manager.all_steps() if s > step]:
            _set_aside(manager, corrupt)
        loaded = {name: restored[name] for name in STATE_ITEMS}
        loaded["step"] = jax.device_put(np.int32(step), state.step.sharding)
        return state.replace(**loaded), restored["data"]
    if errors:
        raise OSError(
            f"no checkpoint in {manager.directory} can be read:\n"
            + "\n".join(errors)
            + "\nRestore "
            "one from a copy, or begin a new workdir."
        )
    return None


def _set_aside(manager, step):
    """Keeps what is left of a damaged checkpoint, out of the way of the step's next save."""
    source = pathlib.Path(manager.directory) / str(step)
    target = source.parents[1] / "corrupt_checkpoints" / str(step)
    if jax.process_index() == 0:
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
        shutil.move(source, target)
        logger.warning("moved the damaged checkpoint %d to %s", step, target)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("set_aside")
    manager.reload()


def restore_params(workdir: pathlib.Path, params, step: int | None = None, raw: bool = False):
    """(params, step): the EMA parameters of a checkpoint, or with raw the trained ones.

    Args: params, a tree of jax.ShapeDtypeStruct with shardings.   step: None is the newest.
    Raises: FileNotFoundError, listing the steps there are.
    """
    directory = workdir.absolute() / "checkpoints"
    steps = _steps(workdir)
    if not steps or step not in (None, *steps):
        raise FileNotFoundError(
            f"no checkpoint{'' if step is None else f' of step {step}'} in {directory}; "
            f"there are: {', '.join(map(str, steps)) or 'none'}."
        )
    step = steps[-1] if step is None else step
    item = "params" if raw else "ema_params"
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(directory / str(step) / item, params), step


def _may_change(key):
    return key in MAY_CHANGE or key.partition(".")[0] + "." in MAY_CHANGE


def _flatten(config, prefix=""):
    """'model.depth' -> value for every key."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
