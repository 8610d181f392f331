"""The pure step of training and of evaluation, and the program that a config determines."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from ml_collections import ConfigDict

from dit_jax import latents, models, sharding, workdirs
from dit_jax.config import ranges
from dit_jax.data import loader, sources
from dit_jax.errors import UserError
from dit_jax.training import optimizer, tasks


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
        raise UserError(
            f"profile_start_step={config.profile_start_step} must be below "
            f"total_steps={config.total_steps}; 0 is no profile."
        )
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_batch_size(mesh, config.batch_size, config.grad_accumulation_steps)
    model = models.build(config.model)
    task = tasks.build(config, model, mesh)
    hidden_size = config.model.get("hidden_size")
    tx = optimizer.make_optimizer(config.optim, config.total_steps, hidden_size)
    shapes = jax.eval_shape(functools.partial(begin, tx), models.param_shapes(model))
    state = sharding.with_shardings(mesh, shapes)
    return Program(config, mesh, model, task, tx, state)


def _check_keys(config):
    """Demands the keys of a run, and no others: what nothing reads would change nothing."""
    try:
        workdirs.check_types(config.to_dict())
    except ValueError as error:
        raise UserError(f"the config has other keys than configs/default.py: {error}") from None


def init_state(model, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state before the first step; the EMA begins at the initial parameters."""
    return begin(tx, models.init_params(model, key))


def begin(tx, params):
    return TrainState(jnp.zeros((), jnp.int32), params, params, tx.init(params))


def train_step(
    state: TrainState, batch: dict, key: jax.Array, frozen: latents.Frozen, *, program: Program
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step on a global batch.

    Args:
      batch: 'image' or 'moments', and 'label', or 'record'; [B, ...], as `data` yields them.
      key: of the run; this step's is folded from it.
      frozen: of `latents.load_frozen`.
    Returns: the next state, and scalars: loss, its parts, grad_norm, param_norm,
      learning_rate.
    """
    config, task = program.config, program.task
    examples = task.examples(batch, jax.random.fold_in(key, state.step), frozen, dropout=True)

    def mean_loss(params, examples):
        losses = task.losses(params, frozen, examples)
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
    """The mean of grad(examples) over config.grad_accumulation_steps micro-batches in turn."""
    steps = program.config.grad_accumulation_steps
    if steps == 1:
        return grad(examples)
    rows = jax.sharding.PartitionSpec(None, *sharding.BATCH)

    def split(a):
        # [B, ...] -> [steps, B/steps, ...], every device's rows staying where they are.
        a = a.reshape(-1, steps, *a.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(a, jax.NamedSharding(program.mesh, rows))

    def body(total, micro_batch):
        return jax.tree.map(jnp.add, total, grad(micro_batch)), None

    micro_batches = jax.tree.map(split, examples)
    shapes = jax.eval_shape(grad, jax.tree.map(lambda a: a[0], micro_batches))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    total, _ = jax.lax.scan(body, zeros, micro_batches)
    return jax.tree.map(lambda a: a / steps, total)


def eval_step(
    params, batch: dict, key: jax.Array, frozen: latents.Frozen, *, program: Program
) -> dict[str, jax.Array]:
    """Sums over the batch, weighted by batch['weight']: the loss's parts, and the weight itself."""
    examples = program.task.examples(batch, key, frozen, dropout=False)
    losses = program.task.losses(params, frozen, examples)
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


def compile_evaluate(program: Program, source: sources.Source, frozen) -> Callable:
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
            sums = step(params, sharding.put_batch(program.mesh, batch), jax.random.key(i), frozen)
            total = {name: total.get(name, 0) + value for name, value in sums.items()}
        weight = float(total.pop("weight"))
        return {f"eval_{name}": float(value) / weight for name, value in total.items()}

    return evaluate
