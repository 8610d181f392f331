"""Orbax checkpoints in DIR/checkpoints/<step>.

A checkpoint has the items params, ema_params, opt_state, data (JSON with the state of the input
pipeline), config and digest. The digest has a number per array, so that a bit that has changed on
the disk is noticed.
"""

import contextlib
import errno
import logging
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from dit_jax import models, sharding
from dit_jax.errors import MissingFileError, UserError, UserFileError
from dit_jax.system import files, json_files, stopping
from dit_jax.workdirs import checkpoint_files, claims, digests, run_config

logger = logging.getLogger("dit_jax")

STATE_ITEMS = ("params", "ema_params", "opt_state")
# With these errors a checkpoint cannot be read at the moment, but may be intact.
NO_DAMAGE = (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.ESTALE)


@contextlib.contextmanager
def open_manager(workdir: pathlib.Path, config: ConfigDict) -> Iterator[ocp.CheckpointManager]:
    """Opens Orbax's manager of DIR/checkpoints, which writes asynchronously and atomically.

    The config decides which checkpoints are kept. The end of the context, also by an error, waits
    for the checkpoint that is being written.
    Raises: OSError at the end of the context if a checkpoint could not be written.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=config.checkpoint_keep,
        keep_period=config.checkpoint_keep_every_steps or None,
        cleanup_tmp_directories=True,
        # `workdirs.claim` has created the directory. If it was moved, it must not be recreated.
        create=False,
        async_options=ocp.options.AsyncOptions(barrier_sync_fn=_wait_at_barrier),
    )
    manager = ocp.CheckpointManager(workdir.absolute() / "checkpoints", options=options)
    failed = True
    try:
        yield manager
        failed = False
    finally:
        try:
            manager.close()
        except Exception as error:
            if not failed:
                raise _make_write_error(manager, error) from error
            # Only logged, because the exception that ended the run must reach the user.
            logger.error("%s", _make_write_error(manager, error))


def _wait_at_barrier(*, key: str, timeout_ms: int) -> None:
    """Waits at a barrier of Orbax; raises the current exception instead if there is one.

    Orbax may wait here while it handles a failed write. This process would then be at a later
    barrier than the others, and all would wait for each other until the timeout of ten minutes.
    """
    if (error := sys.exc_info()[1]) is not None:
        raise error
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def save(manager: ocp.CheckpointManager, step: int, state, data_state: dict, config) -> None:
    """Starts writing checkpoint <step>, once the checkpoint before it is complete.

    Args: data_state, a JSON value with the state of the input pipeline and records of the run.
    Raises: OSError if the earlier checkpoint could not be written, or this one was not started.
    """
    trees = {name: getattr(state, name) for name in STATE_ITEMS}
    try:
        begun = manager.save(step, args=_make_items(trees, step, data_state, config))
    except Exception as error:
        raise _make_write_error(manager, error) from error
    if not begun:  # Orbax skips a step that is not after its latest one
        raise UserFileError(
            f"checkpoint {step} was not written: {manager.directory} holds {manager.all_steps()}. "
            "Stop any other process that trains in this workdir."
        )


def _make_items(trees, step, data_state, config):
    """Returns Orbax's arguments for saving a checkpoint: trees {item: tree}, and JSON values."""
    # The config is saved in case config.json is lost, and data_state for data.json likewise.
    values = {
        "data": data_state,
        "config": config.to_dict(),
        "digest": digests.digest_items(trees, step, data_state),
    }
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    items |= {name: ocp.args.JsonSave(value) for name, value in values.items()}
    return ocp.args.Composite(**items)


def save_params(workdir: pathlib.Path, config: ConfigDict, params) -> None:
    """Writes converted parameters to a new workdir, as the EMA parameters of checkpoint 0.

    Raises: ValueError if the workdir already has checkpoints; OSError if it cannot be written.
    """
    if steps := checkpoint_files.saved_steps(workdir):
        raise UserError(f"{workdir} holds checkpoints {steps} already. Choose another directory.")
    with claims.claim(workdir, config):
        _write_params(workdir, config, params, 0, {})


def replace_params(
    workdir: pathlib.Path, config: ConfigDict, params, step: int, values: dict
) -> None:
    """Writes EMA parameters to a workdir as its only checkpoint; removes all other checkpoints.

    Args: values, a JSON value that `saved_values` returns.
    Raises: OSError if the checkpoint cannot be written.
    """
    with claims.claim(workdir, config):
        old_steps = checkpoint_files.saved_steps(workdir)
        _write_params(workdir, config, params, step, values)

        # The new checkpoint is complete, so one is always left.
        def remove_old():
            for old_step in set(old_steps) - {step}:
                shutil.rmtree(workdir / "checkpoints" / str(old_step))

        message = f"cannot remove the checkpoints {old_steps} of {workdir}"
        sharding.in_first_process(remove_old, message)


def saved_values(workdir: pathlib.Path) -> dict:
    """Returns the values that `replace_params` saved with the newest checkpoint.

    Returns {} if there is no checkpoint, or if its values cannot be read, which is logged.
    """
    try:
        for path in checkpoint_files.newest_first(workdir, "data"):
            return dict(json_files.read_json(path, "the values of a checkpoint"))
    except (OSError, ValueError, TypeError) as error:
        logger.warning("cannot read how %s was chosen: %s", workdir, error)
    return {}


def _write_params(workdir, config, params, step, values):
    """Writes config.json and checkpoint <step>, which has only EMA parameters."""
    run_config.write_config(workdir, config)
    items = _make_items({"ema_params": params}, step, values, config)
    directory = workdir.absolute() / "checkpoints" / str(step)
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(directory, args=items, force=True)
    except BaseException as error:  # also for a signal, no unfinished checkpoint must remain
        for unfinished in directory.parent.glob(f"{step}.orbax-checkpoint-tmp*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        stopping.raise_wrapped(error)
        if not isinstance(error, Exception):
            raise
        raise UserFileError(f"cannot write {workdir}: {type(error).__name__}: {error}") from error


def check_for_errors(manager: ocp.CheckpointManager) -> None:
    """Raises an OSError if a checkpoint that was started could not be written."""
    try:
        manager.check_for_errors()
    except Exception as error:
        raise _make_write_error(manager, error) from error


def _make_write_error(manager, error):
    """Returns the error for a checkpoint that could not be written, with the way out."""
    steps = checkpoint_files.saved_steps(pathlib.Path(manager.directory).parent)
    last = f"the last complete one is step {steps[-1]}" if steps else "there is no earlier one"
    return UserFileError(
        f"cannot write a checkpoint to {manager.directory}: {type(error).__name__}: {error}\n"
        f"Training stops; {last}. Free space or give permission there, then run the same command."
    )


def restore_latest(manager: ocp.CheckpointManager, state):
    """Returns (state, data_state) of the newest readable checkpoint; None without checkpoints.

    Unreadable checkpoints are moved to DIR/corrupt_checkpoints, and an older one is used.

    Args: state, a tree of jax.ShapeDtypeStruct with the shardings to restore to.
    Raises: OSError if there are checkpoints but none can be read.
    """
    steps = checkpoint_files.saved_steps(pathlib.Path(manager.directory).parent)[::-1]
    if not steps:
        return None
    items = {name: ocp.args.StandardRestore(getattr(state, name)) for name in STATE_ITEMS}
    step, loaded, data_state = _restore_newest(pathlib.Path(manager.directory), steps, items)
    # Moved only now: if no checkpoint can be read, all of them stay.
    for corrupt in steps[: steps.index(step)]:
        _set_aside(manager, corrupt)
    loaded["step"] = jax.device_put(np.int32(step), state.step.sharding)
    return state.replace(**loaded), data_state


def _set_aside(manager, step):
    """Moves a damaged checkpoint to DIR/corrupt_checkpoints; its step can then be saved again."""
    source = pathlib.Path(manager.directory) / str(step)
    target = source.parents[1] / "corrupt_checkpoints" / str(step)

    def move():
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
        shutil.move(source, target)
        logger.warning("moved the damaged checkpoint %d to %s", step, target)

    sharding.in_first_process(move, f"cannot move the damaged checkpoint {source}")
    manager.reload()  # its list of checkpoints is from before the move


def restore_params(workdir: pathlib.Path, params, step: int | None = None, raw: bool = False):
    """Returns (EMA parameters, step) of a checkpoint; with `raw` the trained parameters instead.

    A checkpoint may have more top-level groups of parameters than requested: only training uses
    them. Each requested group must match the saved group exactly.

    Args:
      params: the requested parameters, a tree of jax.ShapeDtypeStruct with shardings.
      step: the step of the checkpoint; None for the newest one that can be read.
    Raises: FileNotFoundError that lists the existing steps; OSError if the checkpoint cannot be
      read or lacks parameters; `files.LostError` if the workdir was moved; ValueError for raw
      parameters of a converted model, which has only EMA parameters.
    """
    directory = workdir.absolute() / "checkpoints"
    # The caller has read the config in the workdir, so a workdir that is missing now was moved.
    with files.Directory(workdir):
        steps = checkpoint_files.saved_steps(workdir)
        if not steps or step not in (None, *steps):
            wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
            raise MissingFileError(
                f"no {wanted} in {directory}; there are: {', '.join(map(str, steps)) or 'none'}."
            )
        item = "params" if raw else "ema_params"
        candidates = steps[::-1] if step is None else [step]
        if raw and not (directory / str(steps[-1]) / item).is_dir():
            raise UserError(f"{workdir} holds only EMA parameters: leave out --raw.")
        restore_args = ocp.checkpoint_utils.construct_restore_args(params)
        request = ocp.args.PyTreeRestore(params, restore_args, partial_restore=True)
        step, loaded, _ = _restore_newest(directory, candidates, {item: request})
    return loaded[item], step


def load_model(workdir: pathlib.Path, mesh: jax.sharding.Mesh, dtype: str, name: str):
    """Returns (model, newest EMA parameters) of a workdir, replicated over the mesh.

    Args: dtype, of the activations; name, the expected `config.model.name`.
    Raises: FileNotFoundError or OSError as `restore_params`; ValueError for another model.
    """
    config = run_config.load_config(workdir)
    if config.model.name != name:
        raise UserError(f"{workdir} holds a {config.model.name!r}, not a {name!r}.")
    config.model.dtype = dtype
    model = models.build(config.model)
    everywhere = sharding.replicated(mesh)
    shapes = jax.tree.map(lambda leaf: leaf.update(sharding=everywhere), models.param_shapes(model))
    params, _ = restore_params(workdir, shapes)
    return model, params


def _restore_newest(directory, steps, items):
    """Returns (step, {item: tree}, data_state) of the first step in `steps` that can be read.

    Args: items, {item: Orbax's arguments for restoring it}.
    Raises: OSError if no step can be read, or if one cannot be read but may be intact.
    """
    errors = []
    for step in steps:
        try:
            return step, *_restore(directory, step, items)
        except OSError as error:
            # An errno means that the checkpoint may be intact. An older one must not replace it.
            if error.errno is not None:
                raise
            errors.append(f"  step {step}: {error}")
            logger.warning("checkpoint %d cannot be read: %s", step, error)
    other_steps = sorted(set(checkpoint_files.saved_steps(directory.parent)) - set(steps))
    way_out = f"choose another step: {other_steps}" if other_steps else "restore one from a copy"
    raise UserFileError(
        f"no checkpoint in {directory} can be read:\n"
        + "\n".join(errors)
        + f"\nTo go on, {way_out}, or begin a new workdir."
    )


def _restore(directory, step, items):
    """Returns ({item: tree}, data_state) of a checkpoint, exactly as they were saved.

    Raises: OSError, in all processes, if the checkpoint cannot be read or is damaged. The error has
      an errno if the checkpoint may be intact.
    """
    json_items = {"data": ocp.args.JsonRestore(), "digest": ocp.args.JsonRestore()}
    # Each process restores alone, without Orbax's barriers. At a barrier, the processes that can
    # read would wait for one that cannot.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=f"process_{jax.process_index()}",
    )
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone)
    )
    problem = ""
    # Errors become a problem, so that all processes reach all_true below.
    try:
        files.check_tree(directory / str(step))
        run_config.check_step(directory.parent, step)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            arguments = ocp.args.Composite(**items, **json_items)
            restored = checkpointer.restore(directory / str(step), args=arguments)
        loaded = {name: restored[name] for name in items}
        _check_names(loaded, restored["digest"])
    # Orbax, tensorstore and JSON each raise their own exceptions for a damaged file.
    except Exception as error:
        stopping.raise_wrapped(error)
        # tensorstore's errors have the text of an errno, but not its number.
        for number in NO_DAMAGE:
            if (text := os.strerror(number)) in str(error):
                raise UserFileError(number, text, str(directory / str(step))) from error
        if stopping.is_out_of_memory(error):
            raise  # not damaged
        problem = (str(error).splitlines() or [""])[0][:300]
        # Errors of this project are sentences; those of others are clear only with their type.
        if not isinstance(error, (UserError, UserFileError)):
            problem = f"{type(error).__name__}: {problem}"
    if not sharding.all_true(not problem):
        raise UserFileError(problem or "another process cannot read its part")
    # Orbax does not notice all changed bits, so the digests are computed again.
    saved, computed = restored["digest"], digests.digest_items(loaded, step, restored["data"])
    if changed := [name for name, digest in computed.items() if saved.get(name) != digest]:
        raise UserFileError(
            f"{len(changed)} of {len(computed)} arrays are not what was saved, such as {changed[0]}"
        )
    return loaded, restored["data"]


def _check_names(loaded, saved_digests):
    """Raises OSError unless the loaded groups, such as ema_params/blocks, are complete."""
    if not isinstance(saved_digests, dict):
        raise UserFileError("its digest is not what was saved")
    arrays = digests.name_leaves(loaded)
    groups = tuple({"/".join(name.split("/")[:2]) + "/" for name in arrays})
    for name, array in arrays.items():
        # Orbax leaves the request in the place of an array that the checkpoint lacks.
        if isinstance(array, jax.ShapeDtypeStruct):
            raise UserFileError(f"it lacks {name}")
    for name in saved_digests:
        if name.startswith(groups) and name not in arrays:
            raise UserFileError(f"it holds {name}, which is not in the model")
