"""Training: one jitted, donated step and one straight loop around it.

  python -m dit_jax.train --config configs/digits.py --workdir runs/digits [--config.seed=1]

Run the same command again and it resumes from the newest checkpoint.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import pathlib
import signal
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from absl import flags
from flax import struct
from ml_collections import ConfigDict

from dit_jax import best, cli, conditions, latents, models, optimizer, sharding, tasks, workdirs
from dit_jax.config import ranges
from dit_jax.data import loader, sources
from dit_jax.system import files, stopping
from dit_jax.training import metric_log, sample_distance
from dit_jax.workdirs import checkpoint, identity

FLAGS = flags.FLAGS
logger = logging.getLogger("dit_jax")

# Of a model, what may differ from the one whose weights it begins with.
MAY_DIFFER = ("dtype", "attention", "remat", "scan_unroll", "dropout", "input_size")


@struct.dataclass
class TrainState:
    """Everything that a step changes; `step` counts finished optimizer steps."""

    step: jax.Array  # [] int32
    params: dict  # f32
    ema_params: dict  # f32
    opt_state: optax.OptState


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What a config determines before any data is read or any array made."""

    config: ConfigDict
    mesh: jax.sharding.Mesh
    model: nn.Module
    task: tasks.Denoising | tasks.Autoencoding
    tx: optax.GradientTransformation
    state: TrainState  # of jax.ShapeDtypeStruct, with shardings

    @property
    def shardings(self) -> TrainState:
        return jax.tree.map(lambda leaf: leaf.sharding, self.state)


def make_program(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Program:
    """Builds and checks everything of a config that needs no data, on devices, by default all.

    Raises: ValueError for values that do not fit together or to the devices.
    """
    _check_keys(config)
    ranges.check(config)
    if config.profile_start_step >= config.total_steps:
        raise ValueError(
            f"profile_start_step={config.profile_start_step} must be below "
            f"total_steps={config.total_steps}; 0 is no profile."
        )
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_batch_size(mesh, config.batch_size, config.grad_accumulation_steps)
    model = models.build(config.model)
    task = tasks.build(config, model, mesh)
    hidden_size = config.model.get("hidden_size")
    tx = optimizer.make_optimizer(config.optim, config.total_steps, hidden_size)
    shapes = jax.eval_shape(functools.partial(_begin, tx), models.param_shapes(model))
    state = sharding.with_shardings(mesh, shapes)
    return Program(config, mesh, model, task, tx, state)


def _check_keys(config):
    """Demands the keys of a run, and no others: what nothing reads would change nothing."""
    try:
        workdirs.check_types(config.to_dict())
    except ValueError as error:
        raise ValueError(f"the config has other keys than configs/default.py: {error}") from None


def init_state(model, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state before the first step; the EMA begins at the initial parameters."""
    return _begin(tx, models.init_params(model, key))


def _begin(tx, params):
    return TrainState(jnp.zeros((), jnp.int32), params, params, tx.init(params))


def new_state(program: Program, key: jax.Array) -> TrainState:
    """The initial state, born sharded: no device ever holds more than its share.

    Raises: as `checkpoint.restore_params`, of the weights of config.init_from; ValueError if these
      are another model's, or of another process or prediction.
    """
    if program.config.init_from:
        workdir = files.to_path(program.config.init_from, "init_from")
        _check_weights(program.config, workdir)
        params, step = checkpoint.restore_params(workdir, program.state.params)
        logger.info("beginning with the EMA weights of %s, step %d", workdir, step)
        begin = functools.partial(_begin, program.tx)
        state = jax.jit(begin, out_shardings=program.shardings)(params)
    else:
        init = functools.partial(init_state, program.model, program.tx)
        state = jax.jit(init, out_shardings=program.shardings)(key)
    # Here a state that memory does not hold is an error; on CPUs int(state.step) never returns.
    return jax.block_until_ready(state)


def _check_weights(config, workdir):
    """Demands that the weights in a workdir mean there what they will mean here.

    That another VAE or text encoder stood beside them is a warning: training may make up for it.
    """
    their_config = workdirs.load_config(workdir)
    for part, key in (("latents", "vae_digest"), ("text", "encoder_digest")):
        there, here = (c.get(part, {}).get(key) for c in (their_config, config))
        if there and here and there != here:
            logger.warning(
                "init_from=%s was trained on %s.%s=%s, not %s", workdir, part, key, there, here
            )
    theirs, ours = (_meaning(c) for c in (their_config, config))
    if differing := [key for key in ours if theirs.get(key) != ours[key]]:
        lines = [f"  {key}: there {theirs.get(key)!r}, here {ours[key]!r}" for key in differing]
        raise ValueError(
            f"init_from={workdir} holds weights of another model, process or prediction; these "
            "differ:\n" + "\n".join(lines) + "\nSet them as there, or init_from to another workdir."
        )


def _meaning(config):
    """{key: value} of all that decides which arrays there are and what they compute."""
    kept = {
        key: value
        for key, value in workdirs.flatten(config).items()
        if key.startswith(("model.", "diffusion.")) or key == "objective.prediction"
    }
    for name in MAY_DIFFER:
        kept.pop(f"model.{name}", None)
    dropout = kept.pop("model.class_dropout_prob", 0)
    if config.model.get("condition") == "label":
        kept["model.class_dropout_prob > 0"] = dropout > 0  # there is a null class
    else:
        kept.pop("model.num_classes", None)
    return json.loads(json.dumps(kept))  # tuples are lists in a workdir


def train_step(
    state: TrainState, batch: dict, key: jax.Array, resident: dict, *, program: Program
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step on a global batch.

    Args:
      batch: 'image' or 'moments', and 'label', or 'record'; [B, ...], as `data` yields them.
      key: of the run; this step's is folded from it.
      resident: of the task's `load_resident`.
    Returns: the next state, and scalars: loss, its parts, grad_norm, param_norm,
      learning_rate.
    """
    config, task = program.config, program.task
    examples = task.examples(batch, jax.random.fold_in(key, state.step), resident, dropout=True)

    def mean_loss(params, *examples):
        losses = task.losses(params, resident, *examples)
        scalars = {name: jnp.mean(loss) for name, loss in losses.items()}
        return scalars["loss"], scalars

    grad = functools.partial(jax.grad(mean_loss, has_aux=True), state.params)
    grads, scalars = _accumulate(program, grad, examples)
    # Left to itself XLA keeps replicated gradients under fsdp.
    grads = jax.lax.with_sharding_constraint(grads, program.shardings.params)
    updates, opt_state = program.tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = optimizer.update_ema(state.ema_params, params, config.optim.ema_decay)
    scalars["grad_norm"] = optax.global_norm(grads)
    scalars["param_norm"] = optax.global_norm(params)
    scalars["learning_rate"] = optimizer.schedule(config.optim, config.total_steps)(state.step)
    return TrainState(state.step + 1, params, ema_params, opt_state), scalars


def _accumulate(program, grad, examples):
    """The mean of grad(*examples) over config.grad_accumulation_steps micro-batches in turn."""
    steps = program.config.grad_accumulation_steps
    if steps == 1:
        return grad(*examples)
    rows = jax.sharding.PartitionSpec(None, *sharding.BATCH)

    def split(a):
        # [B, ...] -> [steps, B/steps, ...], every device's rows staying where they are.
        a = a.reshape(-1, steps, *a.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(a, jax.NamedSharding(program.mesh, rows))

    def body(total, micro_batch):
        return jax.tree.map(jnp.add, total, grad(*micro_batch)), None

    micro_batches = jax.tree.map(split, examples)
    shapes = jax.eval_shape(grad, *jax.tree.map(lambda a: a[0], micro_batches))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    total, _ = jax.lax.scan(body, zeros, micro_batches)
    return jax.tree.map(lambda a: a / steps, total)


def eval_step(
    params, batch: dict, key: jax.Array, resident: dict, *, program: Program
) -> dict[str, jax.Array]:
    """Sums over the batch, weighted by batch['weight']: the loss's parts, and the weight itself."""
    examples = program.task.examples(batch, key, resident, dropout=False)
    losses = program.task.losses(params, resident, *examples)
    sums = {name: jnp.sum(loss * batch["weight"]) for name, loss in losses.items()}
    return {**sums, "weight": jnp.sum(batch["weight"])}


def compile_train_step(program: Program) -> Callable:
    """`train_step` jitted; it takes over the state's buffers."""
    return jax.jit(
        functools.partial(train_step, program=program),
        donate_argnums=0,
        compiler_options=models.compiler_options(),
        out_shardings=(program.shardings, sharding.replicated(program.mesh)),
    )


def compile_evaluate(program: Program, source: sources.Source, resident: dict) -> Callable:
    """`evaluate(params) -> {name: mean}` over a source, at the same times and noise every call.

    Each image counts `config.eval_draws` times, every time with others.
    """
    step = jax.jit(
        functools.partial(eval_step, program=program),
        compiler_options=models.compiler_options(),
        out_shardings=sharding.replicated(program.mesh),
    )
    batch_size, draws = program.config.batch_size, program.config.eval_draws
    rows = sharding.local_rows(program.mesh, batch_size)

    def evaluate(params):
        total = {}
        passes = (loader.eval_batches(source, batch_size, rows) for _ in range(draws))
        for i, batch in enumerate(itertools.chain.from_iterable(passes)):
            sums = step(
                params, sharding.put_batch(program.mesh, batch), jax.random.key(i), resident
            )
            total = {name: total.get(name, 0) + value for name, value in sums.items()}
        weight = float(total.pop("weight"))
        return {f"eval_{name}": float(value) / weight for name, value in total.items()}

    return evaluate


def train_and_evaluate(config: ConfigDict, workdir: pathlib.Path) -> TrainState:
    """Trains to config.total_steps, continuing from the newest checkpoint in the workdir.

    Writes checkpoints/, metrics.jsonl, tensorboard/ and samples/ there.
    Raises: ValueError, OSError or FloatingPointError with the way out; checkpoints stay intact.
      stopping.Stopped at SIGTERM or Ctrl-C, after it has saved.
    """
    sources.check_outside(config, workdir)
    here = files.Directory(workdir) if workdir.is_dir() else None
    train_source = sources.open_split(config, "train")
    config = latents.resolve(config, train_source.metadata)
    vae, mesh = None, sharding.make_mesh(config.mesh)
    config, encoder = conditions.resolve(config, train_source.metadata, mesh)
    if config.latents.source != "pixels" and config.latents.vae:
        vae = latents.load_run_vae(config, mesh)
        if config.latents.source == "images":  # nothing else has recorded which one it is
            config = latents.resolve(config, dict(vae_digest=vae.digest, published=vae.published))
    program = make_program(config)
    eval_source = None
    if config.eval_every_steps and config.data.eval_split:
        eval_source = sources.open_split(config, "eval")
    key = jax.random.key(config.seed)
    total_steps = config.total_steps

    def due(step, every):
        return every and step % every == 0

    with contextlib.ExitStack() as stack:
        # Else a workdir that was moved meanwhile would be begun anew.
        sharding.together(lambda: here and here.check())
        lock = stack.enter_context(workdirs.claim(workdir, config))
        # Before the manager, so out after it: a second SIGTERM must not end the last checkpoint's
        # writing.
        notice = "ending this step, then saving."
        signals = stack.enter_context(stopping.Deferring(notice))
        splits = {"train": train_source} | ({"eval": eval_source} if eval_source else {})
        data_record = identity.check_splits(splits, workdir)
        manager = stack.enter_context(checkpoint.open_manager(workdir, config))
        restored = checkpoint.restore_latest(manager, program.state)
        state, data_state = restored or (new_state(program, key), None)
        first_step = int(state.step)
        if first_step >= total_steps:
            logger.info("%s is done: step %d of %d.", workdir, first_step, total_steps)
            return state
        if first_step:
            logger.info("resuming from checkpoint %d", first_step)
        log_summary(program, train_source.class_names)

        rows = sharding.local_rows(program.mesh, config.batch_size)
        batches = loader.TrainIterator(train_source, config, rows, data_state)
        step_fn = compile_train_step(program)
        resident = program.task.load_resident(train_source, vae, encoder)
        evaluate = compile_evaluate(program, eval_source, resident) if eval_source else None
        draw = None
        if config.sample_every_steps:
            source = eval_source or train_source
            draw = program.task.compile_picture(resident, source, vae, encoder)
        measured, measured_by = [(evaluate, config.eval_every_steps)] if evaluate else [], {}
        if "fid" in config and config.fid.every_steps:
            distance, measured_by = sample_distance.compile_distance(program.task, vae, encoder)
            measured.append((distance, config.fid.every_steps))
            before = (data_state or {}).get("measured_by", {})
            if changes := sample_distance.describe_changes(before, measured_by):
                name = sample_distance.training_name(config)
                logger.warning("%s is measured otherwise from here: %s", name, "; ".join(changes))
        keeper = best.Best(workdir, config, data_record, measured_by)
        del vae, encoder  # who needs them holds them
        profile = range(0)
        if config.profile_start_step > first_step:
            start = config.profile_start_step
            profile = range(start, start + config.profile_num_steps)
        elif config.profile_start_step:
            logger.warning("step %d is done, so it is not profiled", config.profile_start_step)
        workdirs.write_config(workdir, config)  # all of it is good: the run begins
        workdirs.write_data(workdir, data_record)
        trace = stack.enter_context(contextlib.ExitStack())  # closed early, or with all the rest
        writer = stack.enter_context(metric_log.MetricWriter(workdir, first_step))
        # What a resumed run reports first is the mean of all steps since the report before.
        window = (data_state or {}).get("window")
        if window is None and first_step % config.log_every_steps:
            logger.info("the next means are of the steps after %d alone", first_step)
        progress = stack.enter_context(
            metric_log.Progress(first_step, total_steps, config.batch_size, window)
        )
        same_data = "a run goes on with the data that it began with"
        stack.enter_context(stopping.telling(lambda: f"{_tell(workdir)}; {same_data}"))
        for step in range(first_step + 1, total_steps + 1):
            last = step == total_steps
            if profile and step == profile[0]:
                trace.enter_context(jax.profiler.trace(workdir / "profile"))
            state, scalars = step_fn(
                state, sharding.put_batch(program.mesh, next(batches)), key, resident
            )
            progress.append(scalars)
            if profile and step == profile[-1]:
                with progress.paused():
                    trace.close()
            if due(step, config.log_every_steps) or last:
                lock.check_together()
                writer.scalars(step, progress.report())
                checkpoint.check_for_errors(manager)
            for measure, every in measured:
                if not (due(step, every) or last):
                    continue
                with progress.paused():
                    values = measure(state.ema_params)
                    lock.check_together()
                    keeper.update(step, values, state.ema_params)
                writer.scalars(step, values)
                logger.info("step %d  %s", step, metric_log.format_values(values))
            if due(step, config.sample_every_steps):
                with progress.paused():
                    picture = draw(state.ema_params)
                lock.check_together()
                writer.image(step, "samples", picture)
            stop = manager.reached_preemption(step) if jax.process_count() > 1 else signals.received
            if due(step, config.checkpoint_every_steps) or last or stop:
                with progress.paused():  # and checked: a state that is not finite is never saved
                    lock.check_together()
                    data_state = {**batches.state(), "window": progress.window()}
                    data_state |= {"data": data_record, "measured_by": measured_by}
                    checkpoint.save(manager, step, state, data_state, config)
            if stop:
                break
    if step < total_steps:  # and the checkpoint is written
        number = signals.received or signal.SIGTERM  # that another process has received
        raise stopping.Stopped(number, f"step {step} is saved in {workdir}")
    return state


def log_summary(program: Program, class_names: Sequence[str] | None = None) -> None:
    """What will run, where: one line each for devices, model, classes with names, batch."""
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
    logger.info("model: %s", program.task.summary())
    if class_names:
        logger.info("classes: %s", files.some_of(class_names))
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    logger.info(
        "batch: %d = %d shards x %d accumulation steps x %d images",
        config.batch_size,
        shards,
        config.grad_accumulation_steps,
        config.batch_size // shards // config.grad_accumulation_steps,
    )


def _tell(workdir):
    """What is kept of a run, in words."""
    steps = workdirs.saved_steps(workdir)
    return f"step {steps[-1]} is kept in {workdir}" if steps else "no step is saved yet"


def main(_):
    train_and_evaluate(FLAGS.config, FLAGS.workdir)


if __name__ == "__main__":
    cli.define_config()
    cli.define_path("workdir", None, "Directory of this run.", required=True)
    cli.run(main, kept=lambda: _tell(FLAGS.workdir), saves=True)
