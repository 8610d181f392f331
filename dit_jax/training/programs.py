"""The steps of training and evaluation, pure functions, and the program of a config."""

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

from dit_jax import models, sharding, workdirs
from dit_jax.config import keys
from dit_jax.data import loader, sources
from dit_jax.errors import UserError
from dit_jax.training import optimizer, tasks


@struct.dataclass
class TrainState:
    """The values that a training step changes."""

    step: jax.Array  # [] int32, the number of finished optimizer steps
    params: dict  # f32
    ema_params: dict  # f32
    opt_state: optax.OptState


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The objects that a config determines before data are read or arrays are made."""

    config: ConfigDict
    mesh: jax.sharding.Mesh
    task: tasks.Task
    tx: optax.GradientTransformation
    state: TrainState  # a tree of jax.ShapeDtypeStruct with shardings

    @property
    def model(self) -> nn.Module:
        """The network that is trained."""
        return self.task.model

    @property
    def shardings(self) -> TrainState:
        """The sharding of every leaf of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.state)


def make_program(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Program:
    """Builds the program of a config, after checking the config as far as that needs no data.

    Args: devices, by default all.
    Raises: ValueError for values that fit neither each other nor the devices.
    """
    _check_keys(config)
    keys.check(config)
    if config.profile_start_step >= config.total_steps:
        raise UserError(
            f"profile_start_step={config.profile_start_step} must be below "
            f"total_steps={config.total_steps}. Set it to 0 for no profile."
        )
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_batch_size(mesh, config.batch_size, config.grad_accumulation_steps)
    task = tasks.choose(config).build(config, mesh)
    hidden_size = config.model.get("hidden_size")
    tx = optimizer.make_optimizer(config.optim, config.total_steps, hidden_size)
    # Only shapes: `initial_state.new_state` makes the arrays, sharded from the start.
    shapes = jax.eval_shape(functools.partial(init_state, task, tx), jax.random.key(0), {})
    state = sharding.with_shardings(mesh, shapes)
    return Program(config, mesh, task, tx, state)


def _check_keys(config):
    """Raises ValueError unless the config has exactly the keys of configs/default.py."""
    # An unknown key would have no effect, so it is an error.
    try:
        workdirs.check_types(config.to_dict())
    except ValueError as error:
        raise UserError(f"the keys are not those of configs/default.py: {error}") from None


def init_state(
    task: tasks.Task, tx: optax.GradientTransformation, key: jax.Array, trained: dict
) -> TrainState:
    """Returns the state before the first step; the EMA begins at the initial parameters.

    Args: trained, top-level groups of parameters that replace the task's initial ones.
    """
    params = task.init_params(key) | trained
    return TrainState(jnp.zeros((), jnp.int32), params, params, tx.init(params))


def train_step(
    state: TrainState,
    batch: dict,
    key: jax.Array,
    frozen: tasks.Frozen,
    *,
    program: Program,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one optimizer step on a global batch.

    Args:
      batch: arrays [B, ...] from `data.loader`: 'image' or 'moments', with 'label' or captions; or
        only 'record', the indices of records on the devices.
      key: of the run; the step's key is folded from it.
      frozen: from `Task.load_frozen`.
    Returns: the next state; the scalars loss, its parts, grad_norm, param_norm and learning_rate.
    """
    config, task = program.config, program.task
    # All randomness is drawn here, before the batch is split for accumulation.
    examples = task.draw_examples(batch, jax.random.fold_in(key, state.step), frozen, dropout=True)

    def mean_loss(params, examples):
        losses = task.compute_losses(params, frozen, examples)
        scalars = {name: jnp.mean(loss) for name, loss in losses.items()}
        return scalars["loss"], scalars

    grad = functools.partial(jax.grad(mean_loss, has_aux=True), state.params)
    grads, scalars = _accumulate(program, grad, examples)
    # Without this XLA keeps the gradients replicated under fsdp.
    grads = jax.lax.with_sharding_constraint(grads, program.shardings.params)
    updates, opt_state = program.tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = optimizer.update_ema(state.ema_params, params, config.optim.ema_decay)
    scalars["grad_norm"] = optax.global_norm(grads)
    scalars["param_norm"] = optax.global_norm(params)
    scalars["learning_rate"] = optimizer.schedule(config.optim, config.total_steps)(state.step)
    return TrainState(state.step + 1, params, ema_params, opt_state), scalars


def _accumulate(program, grad, examples):
    """Returns the mean of grad(examples) over config.grad_accumulation_steps micro-batches."""
    steps = program.config.grad_accumulation_steps
    if steps == 1:
        return grad(examples)
    spec = jax.sharding.PartitionSpec(None, *sharding.BATCH)

    def split(array):
        # [B, ...] -> [steps, B/steps, ...]; every row stays on its device.
        array = array.reshape(-1, steps, *array.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(array, jax.NamedSharding(program.mesh, spec))

    def add(total, micro_batch):
        return jax.tree.map(jnp.add, total, grad(micro_batch)), None

    micro_batches = jax.tree.map(split, examples)
    # The scan's total begins at zeros. Tracing gives the shapes of grad's outputs.
    shapes = jax.eval_shape(grad, jax.tree.map(lambda a: a[0], micro_batches))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, micro_batches)
    return jax.tree.map(lambda a: a / steps, total)


def eval_step(
    params, batch: dict, key: jax.Array, frozen: tasks.Frozen, *, program: Program
) -> dict[str, jax.Array]:
    """Returns the sums of the loss and its parts over the batch, weighted by batch['weight'].

    'weight' is the sum of the weights.
    """
    examples = program.task.draw_examples(batch, key, frozen, dropout=False)
    losses = program.task.compute_losses(params, frozen, examples)
    sums = {name: jnp.sum(loss * batch["weight"]) for name, loss in losses.items()}
    return {**sums, "weight": jnp.sum(batch["weight"])}


def compile_train_step(program: Program) -> Callable:
    """Returns `train_step` jitted; it donates the state's buffers."""
    return jax.jit(
        functools.partial(train_step, program=program),
        donate_argnums=0,
        compiler_options=models.compiler_options(),
        out_shardings=(program.shardings, sharding.replicated(program.mesh)),
    )


def compile_evaluate(program: Program, source: sources.Source, frozen) -> Callable:
    """Returns `evaluate(params) -> {name: mean}` over a source.

    Each image counts `config.eval_draws` times, with other times and noise each time. All calls use
    the same times and noise.
    """
    step = jax.jit(
        functools.partial(eval_step, program=program),
        compiler_options=models.compiler_options(),
        out_shardings=sharding.replicated(program.mesh),
    )
    batch_size, draws = program.config.batch_size, program.config.eval_draws
    process_rows = sharding.local_rows(program.mesh, batch_size)

    def evaluate(params):
        total = {}
        passes = (loader.eval_batches(source, batch_size, process_rows) for _ in range(draws))
        # The key is the count of batches over all passes, so passes differ and calls agree.
        for i, batch in enumerate(itertools.chain.from_iterable(passes)):
            sums = step(params, sharding.put_batch(program.mesh, batch), jax.random.key(i), frozen)
            total = {name: total.get(name, 0) + value for name, value in sums.items()}
        weight = float(total.pop("weight"))
        return {f"eval_{name}": float(value) / weight for name, value in total.items()}

    return evaluate
