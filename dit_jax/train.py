"""Trains a model: a plain loop around one jitted step.

  python -m dit_jax.train --config configs/digits.py --workdir runs/digits [--config.seed=1]

Run the same command again to resume from the newest checkpoint.
"""

import contextlib
import logging
import pathlib
import signal
from collections.abc import Sequence

import jax
from absl import flags
from ml_collections import ConfigDict

from dit_jax import cli, latents, sharding, workdirs
from dit_jax.data import folders, loader
from dit_jax.system import files, stopping
from dit_jax.training import (
    best,
    initial_state,
    metric_log,
    profiler,
    programs,
    sample_distance,
    tasks,
)
from dit_jax.workdirs import checkpoint, identity

logger = logging.getLogger("dit_jax")

FLAGS = flags.FLAGS


def train_and_evaluate(config: ConfigDict, workdir: pathlib.Path) -> programs.TrainState:
    """Trains to config.total_steps, from the newest checkpoint in the workdir if there is one.

    Writes checkpoints/, metrics.jsonl, tensorboard/ and samples/ to the workdir.
    Returns: the last state.
    Raises: ValueError, OSError or FloatingPointError, with the way out; checkpoints stay intact.
      stopping.Stopped after SIGTERM or Ctrl-C, once the step is saved.
    """
    # Output in the run's own image folder would become images of the next run.
    folders.check_output_outside_data(config, workdir)
    directory = files.Directory(workdir) if workdir.is_dir() else None
    # The data and the frozen networks complete the config, so the program is made after them.
    train_source = latents.open_split(config, "train")
    mesh = sharding.make_mesh(config.mesh)
    config, frozen = tasks.choose(config).load_frozen(config, mesh, train_source.metadata)
    program = programs.make_program(config)
    eval_source = None
    if config.eval_every_steps and config.data.eval_split:
        eval_source = latents.open_split(config, "eval")
    key = jax.random.key(config.seed)
    total_steps = config.total_steps

    def is_due(step, every_steps):
        return every_steps and step % every_steps == 0

    with contextlib.ExitStack() as stack:
        # The data took a while to open. A workdir that was moved meanwhile must not be made anew.
        sharding.in_every_process(lambda: directory and directory.check())
        lock = stack.enter_context(workdirs.claim(workdir, config))
        # Entered before the checkpoint manager, so left after it. A second SIGTERM must not
        # interrupt the writing of the last checkpoint.
        notice = "ending this step, then saving."
        signals = stack.enter_context(stopping.Deferring(notice))
        # The state is restored from the newest checkpoint that can be read; otherwise it is new.
        splits = {"train": train_source} | ({"eval": eval_source} if eval_source else {})
        data_record = identity.check_splits(splits, workdir)
        manager = stack.enter_context(checkpoint.open_manager(workdir, config))
        restored = checkpoint.restore_latest(manager, program.state)
        state, data_state = restored or (initial_state.new_state(program, key), None)
        first_step = int(state.step)
        if first_step >= total_steps:
            logger.info("%s is done: step %d of %d.", workdir, first_step, total_steps)
            return state
        if first_step:
            logger.info("resuming from checkpoint %d", first_step)
        log_summary(program, train_source.class_names)

        # The first batch is the one after the checkpoint's last batch.
        process_rows = sharding.local_rows(program.mesh, config.batch_size)
        batches = loader.TrainIterator(train_source, config, process_rows, data_state)
        step_fn = programs.compile_train_step(program)
        frozen = frozen.with_records(config, mesh, train_source)
        draw = None
        if config.sample_every_steps:
            draw = program.task.compile_picture(frozen, eval_source or train_source)
        # Each measure of the EMA parameters, with its interval.
        measures, distance_settings = [], {}
        if eval_source:
            evaluate = programs.compile_evaluate(program, eval_source, frozen)
            measures.append((evaluate, config.eval_every_steps))
        if "fid" in config and config.fid.every_steps:
            measure, distance_settings = sample_distance.compile_distance(program.task, frozen)
            measures.append((measure, config.fid.every_steps))
            earlier_settings = (data_state or {}).get("measured_by", {})
            sample_distance.warn_of_changes(config, earlier_settings, distance_settings)
        keeper = best.Best(workdir, config, data_record, distance_settings)
        # Everything has been checked, so the run begins.
        workdirs.write_config(workdir, config)
        workdirs.write_data(workdir, data_record)
        profile = stack.enter_context(profiler.Profiler(workdir, config, first_step))
        writer = stack.enter_context(metric_log.MetricWriter(workdir, first_step))
        # A resumed run's first means include the steps between the last report and the checkpoint.
        window = (data_state or {}).get("window")
        if window is None and first_step % config.log_every_steps:
            logger.info("the first means leave out the steps up to %d", first_step)
        progress = stack.enter_context(
            metric_log.Progress(first_step, total_steps, config.batch_size, window)
        )
        # The message of an error in the loop then ends with the step that is saved.
        resume_rule = "a run goes on with the data that it began with"
        stack.enter_context(
            stopping.attach_kept_message(lambda: f"{_describe_saved(workdir)}; {resume_rule}")
        )
        # The host runs ahead of the devices: it dispatches steps, and fetches their scalars later.
        for step in range(first_step + 1, total_steps + 1):
            last = step == total_steps
            profile.before_step(step)
            state, scalars = step_fn(
                state, sharding.put_batch(program.mesh, next(batches)), key, frozen
            )
            progress.append(scalars)  # raises if an earlier step was not finite
            profile.after_step(step, progress)
            if is_due(step, config.log_every_steps) or last:
                lock.check_together()  # nothing is written if the workdir was moved
                writer.scalars(step, progress.report())
                checkpoint.check_for_errors(manager)  # a checkpoint is written in the background
            for measure, every_steps in measures:
                if not (is_due(step, every_steps) or last):
                    continue
                with progress.paused():
                    values = measure(state.ema_params)
                    lock.check_together()
                    keeper.update(step, values, state.ema_params)
                writer.scalars(step, values)
                logger.info("step %d  %s", step, metric_log.format_values(values))
            if is_due(step, config.sample_every_steps):
                with progress.paused():
                    picture = draw(state.ema_params)
                lock.check_together()
                writer.image(step, "samples", picture)
            # Several processes must stop at the same step, so JAX chooses the step for all.
            stop = manager.reached_preemption(step) if jax.process_count() > 1 else signals.received
            # Pausing checks the steps, so a state that is not finite is never saved.
            if is_due(step, config.checkpoint_every_steps) or last or stop:
                with progress.paused():
                    lock.check_together()
                    data_state = {**batches.state(), "window": progress.window()}
                    data_state |= {"data": data_record, "measured_by": distance_settings}
                    checkpoint.save(manager, step, state, data_state, config)
            if stop:
                break
    if step < total_steps:  # stopped; leaving the stack has written the checkpoint
        # Another process may have received the signal.
        received = signals.received or signal.SIGTERM
        raise stopping.Stopped(received, f"step {step} is saved in {workdir}")
    return state


def log_summary(program: programs.Program, class_names: Sequence[str] | None = None) -> None:
    """Logs the devices, the model, the names of the classes and the batch, a line each."""
    config, mesh = program.config, program.mesh
    device, processes = mesh.devices.flat[0], jax.process_count()
    logger.info(
        "devices: %d x %s in %s, mesh %s, jax %s",
        mesh.size,
        device.device_kind,
        f"{processes} processes" if processes > 1 else "one process",
        " ".join(f"{axis}={size}" for axis, size in mesh.shape.items()),
        jax.__version__,
    )
    logger.info("model: %s", program.task.describe_model())
    if class_names:
        logger.info("classes: %s", files.list_some(class_names))
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    logger.info(
        "batch: %d = %d shards x %d accumulation steps x %d images",
        config.batch_size,
        shards,
        config.grad_accumulation_steps,
        config.batch_size // shards // config.grad_accumulation_steps,
    )


def _describe_saved(workdir):
    """Returns a sentence about the newest saved step, for a message."""
    steps = workdirs.saved_steps(workdir)
    return f"step {steps[-1]} is kept in {workdir}" if steps else "no step is saved yet"


def main(_):
    train_and_evaluate(FLAGS.config, FLAGS.workdir)


if __name__ == "__main__":
    cli.define_config()
    cli.define_path("workdir", None, "Directory of this run.", required=True)
    cli.run(main, kept=lambda: _describe_saved(FLAGS.workdir), saves=True)
