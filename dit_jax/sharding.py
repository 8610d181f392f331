"""The device mesh, which axis of it shards which axis of which parameter, and several processes."""

import logging
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

logger = logging.getLogger("dit_jax")

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))

# Ends of parameter paths -> mesh axes; L depth, D hidden, H heads, M = mlp_ratio D, P = p*p*C.
# Of all four blocks; none has all of these parameters.
DIT_AXES = {
    "x_embedder/kernel": (None, "fsdp"),  # [P, D]
    "x_embedder/bias": ("fsdp",),  # [D]
    "t_embedder/mlp_0/kernel": (None, "fsdp"),  # [256, D]
    "t_embedder/mlp_0/bias": ("fsdp",),  # [D]
    "t_embedder/mlp_2/kernel": (None, "fsdp"),  # [D, D]
    "t_embedder/mlp_2/bias": ("fsdp",),  # [D]
    "y_embedder/embedding": (None, "fsdp"),  # [classes + 1, D]
    "context_embedder/kernel": (None, "fsdp"),  # [C, D], C context_size
    "context_embedder/bias": ("fsdp",),  # [D]
    "pooled_embedder/kernel": (None, "fsdp"),  # [C, D]
    "pooled_embedder/bias": ("fsdp",),  # [D]
    "text_encoder/token_embedding/embedding": (None, "fsdp"),  # [vocabulary, C]
    "text_encoder/position_embedding": (None, "fsdp"),  # [tokens, C]
    "text_encoder/final_norm/scale": ("fsdp",),  # [C]
    "text_encoder/final_norm/bias": ("fsdp",),  # [C]
    # The text encoder's blocks are in-context ones, with C for D.
    "blocks/adaLN_modulation/kernel": (None, "fsdp", None, "tensor"),  # [L, D, 6 or 4, D]
    "blocks/adaLN_modulation/bias": (None, None, ("tensor", "fsdp")),  # [L, 6 or 4, D]
    "blocks/norm1/scale": (None, "fsdp"),  # [L, D]
    "blocks/norm1/bias": (None, "fsdp"),  # [L, D]
    "blocks/attn/qkv/kernel": (None, "fsdp", None, "tensor", None),  # [L, D, 3, H, D/H]
    "blocks/attn/qkv/bias": (None, None, "tensor", "fsdp"),  # [L, 3, H, D/H]
    "blocks/attn/proj/kernel": (None, "tensor", "fsdp"),  # [L, D, D]
    "blocks/attn/proj/bias": (None, "fsdp"),  # [L, D]
    "blocks/norm_cross/scale": (None, "fsdp"),  # [L, D]
    "blocks/norm_cross/bias": (None, "fsdp"),  # [L, D]
    "blocks/cross_attn/q/kernel": (None, "fsdp", None, "tensor", None),  # [L, D, 1, H, D/H]
    "blocks/cross_attn/q/bias": (None, None, "tensor", "fsdp"),  # [L, 1, H, D/H]
    "blocks/cross_attn/kv/kernel": (None, "fsdp", None, "tensor", None),  # [L, D, 2, H, D/H]
    "blocks/cross_attn/kv/bias": (None, None, "tensor", "fsdp"),  # [L, 2, H, D/H]
    "blocks/cross_attn/proj/kernel": (None, "tensor", "fsdp"),  # [L, D, D]
    "blocks/cross_attn/proj/bias": (None, "fsdp"),  # [L, D]
    "blocks/norm2/scale": (None, "fsdp"),  # [L, D]
    "blocks/norm2/bias": (None, "fsdp"),  # [L, D]
    "blocks/mlp/fc1/kernel": (None, "fsdp", "tensor"),  # [L, D, M]
    "blocks/mlp/fc1/bias": (None, ("tensor", "fsdp")),  # [L, M]
    "blocks/mlp/fc2/kernel": (None, "tensor", "fsdp"),  # [L, M, D]
    "blocks/mlp/fc2/bias": (None, "fsdp"),  # [L, D]
    "final_layer/adaLN_modulation/kernel": ("fsdp", None, "tensor"),  # [D, 2, D]
    "final_layer/adaLN_modulation/bias": (None, ("tensor", "fsdp")),  # [2, D]
    "final_layer/norm/scale": ("fsdp",),  # [D]
    "final_layer/norm/bias": ("fsdp",),  # [D]
    "final_layer/linear/kernel": ("fsdp", None),  # [D, P or 2P]
    "final_layer/linear/bias": (None,),  # [P or 2P]
}
# Convolutions [h, w, in, out], Linears [in, out] and norms.
VAE_AXES = {
    f"{name}/{leaf}": axes
    for names, leaves in (
        (
            "conv_in conv_out conv conv1 conv2 conv_shortcut quant_conv post_quant_conv",
            {"kernel": (None, None, None, "fsdp"), "bias": ("fsdp",)},
        ),
        ("to_q to_k to_v to_out_0", {"kernel": (None, "fsdp"), "bias": ("fsdp",)}),
        ("norm1 norm2 conv_norm_out group_norm", {"scale": ("fsdp",), "bias": ("fsdp",)}),
    )
    for name in names.split()
    for leaf, axes in leaves.items()
}
# V tokens of the vocabulary, M = mlp_size; q_proj, k_proj and v_proj are whole heads in order.
CLIP_AXES = {
    "embeddings_token_embedding/embedding": (None, "fsdp"),  # [V, D]
    "embeddings_position_embedding/embedding": (None, "fsdp"),  # [length, D]
    "encoder_layers/layer_norm1/scale": (None, "fsdp"),  # [L, D]
    "encoder_layers/layer_norm1/bias": (None, "fsdp"),  # [L, D]
    "encoder_layers/self_attn/q_proj/kernel": (None, "fsdp", "tensor"),  # [L, D, D]
    "encoder_layers/self_attn/q_proj/bias": (None, ("tensor", "fsdp")),  # [L, D]
    "encoder_layers/self_attn/k_proj/kernel": (None, "fsdp", "tensor"),  # [L, D, D]
    "encoder_layers/self_attn/k_proj/bias": (None, ("tensor", "fsdp")),  # [L, D]
    "encoder_layers/self_attn/v_proj/kernel": (None, "fsdp", "tensor"),  # [L, D, D]
    "encoder_layers/self_attn/v_proj/bias": (None, ("tensor", "fsdp")),  # [L, D]
    "encoder_layers/self_attn/out_proj/kernel": (None, "tensor", "fsdp"),  # [L, D, D]
    "encoder_layers/self_attn/out_proj/bias": (None, "fsdp"),  # [L, D]
    "encoder_layers/layer_norm2/scale": (None, "fsdp"),  # [L, D]
    "encoder_layers/layer_norm2/bias": (None, "fsdp"),  # [L, D]
    "encoder_layers/mlp/fc1/kernel": (None, "fsdp", "tensor"),  # [L, D, M]
    "encoder_layers/mlp/fc1/bias": (None, ("tensor", "fsdp")),  # [L, M]
    "encoder_layers/mlp/fc2/kernel": (None, "tensor", "fsdp"),  # [L, M, D]
    "encoder_layers/mlp/fc2/bias": (None, "fsdp"),  # [L, D]
    "final_layer_norm/scale": ("fsdp",),  # [D]
    "final_layer_norm/bias": ("fsdp",),  # [D]
}
# Of the UNet what the VAE does not have, or has otherwise; M = 4D. Attention without transformer
# is as the VAE's: it may have one head, which the tensor axis would cut.
UNET_AXES = {
    f"{name}/{leaf}": axes
    for names, leaves in (
        (
            "attn1/to_q attn1/to_k attn1/to_v attn2/to_q attn2/to_k attn2/to_v",
            {"kernel": ("fsdp", "tensor", None)},  # [D or context_size, H, D/H]
        ),
        (
            "attn1/to_out_0 attn2/to_out_0 ff/net_2",
            {"kernel": ("tensor", "fsdp"), "bias": ("fsdp",)},  # [D or M, D]
        ),
        (
            "ff/net_0_proj",
            {"kernel": ("fsdp", None, "tensor"), "bias": (None, ("tensor", "fsdp"))},  # [D, 2, M]
        ),
        (
            "linear_1 linear_2 time_emb_proj proj_in proj_out",
            {"kernel": (None, "fsdp"), "bias": ("fsdp",)},
        ),
        ("norm norm3", {"scale": ("fsdp",), "bias": ("fsdp",)}),
        ("class_embedding", {"embedding": (None, "fsdp")}),  # [classes + 1, 4D or context_size]
    )
    for name in names.split()
    for leaf, axes in leaves.items()
}
# The first that ends a path holds: the UNet's longer names are before the VAE's.
PARAMETER_AXES = DIT_AXES | UNET_AXES | VAE_AXES | CLIP_AXES


def make_mesh(config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config.mesh` over devices, by default all; one axis may be -1, the rest of them.

    Raises: ValueError if the axes do not multiply to the number of devices.
    """
    sizes = [config[axis] for axis in AXES]
    devices = jax.devices() if devices is None else devices
    num_devices = len(devices)
    known = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) == 1 and known > 0 and num_devices % known == 0:
        sizes[sizes.index(-1)] = num_devices // known
    if min(sizes) < 1 or np.prod(sizes) != num_devices:
        wanted = ", ".join(f"mesh.{axis}={config[axis]}" for axis in AXES)
        raise ValueError(
            f"{wanted} do not multiply to the {num_devices} devices; set at most one of them to -1 "
            "(the rest of the devices)."
        )
    # Auto: under jax.make_mesh's default, Explicit, constraints inside jit may be ignored.
    auto = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=auto, devices=devices)


def local_mesh() -> Mesh:
    """All devices of this process, over the batch: for what processes do each for itself."""
    return make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.local_devices())


def pin_batch(x: jax.Array) -> jax.Array:
    """Pins activations x [B, ...] to rows over the batch axes of the mesh in context.

    The mesh is that of `jax.sharding.use_abstract_mesh` while tracing; without one x is returned
    as it is. Needed for right numbers, not only for speed: where a product that is partial over
    the tensor axis was left to XLA, the gradients of the gates, or of what lies before the
    blocks, missed some of its parts (data=2, fsdp=2, tensor=2, one row of a micro-batch per shard;
    jax 0.10.2).
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp; a tensor group holds the same rows."""
    return NamedSharding(mesh, BATCH)


def with_shardings(mesh: Mesh, tree):
    """The tree of jax.ShapeDtypeStruct with the sharding of every leaf, by its path's end.

    Serves parameters, EMA and optimizer moments alike; other leaves (counters) are replicated.
    An axis that the mesh axes do not divide stays whole and is logged.
    """
    logged = set()

    def attach(key_path, leaf):
        sharding = leaf_sharding(key_path, leaf)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def leaf_sharding(key_path, leaf):
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        name = next((name for name in PARAMETER_AXES if ("/" + path).endswith("/" + name)), None)
        if name is None:
            if leaf.ndim:
                logger.warning("no sharding for %s %s: every device holds it", path, leaf.shape)
            return replicated(mesh)
        spec, whole = _fit(mesh, PARAMETER_AXES[name], leaf.shape)
        if whole and name not in logged:
            logged.add(name)
            logger.info("not sharded: %s %s over %s", name, leaf.shape, ", ".join(whole))
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(attach, tree)


def _fit(mesh, spec, shape):
    """The spec with the mesh axes that divide, and those that had to be left out."""
    fitted, whole = [], []
    for size, entry in zip(shape, spec, strict=True):
        kept = []
        for axis in (entry,) if isinstance(entry, str) else entry or ():
            if size % mesh.shape[axis]:
                whole.append(f"{axis}={mesh.shape[axis]}")
            else:
                kept.append(axis)
                size //= mesh.shape[axis]
        fitted.append(tuple(kept) or None)
    return fitted, whole


def check_batch_size(mesh: Mesh, batch_size: int, grad_accumulation_steps: int = 1) -> None:
    """Demands that every device gets the same number of rows of every micro-batch.

    Raises: ValueError with the sizes.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    unit = shards * grad_accumulation_steps
    if grad_accumulation_steps < 1 or batch_size < unit or batch_size % unit:
        raise ValueError(
            f"{batch_size=} must be a multiple of {unit}: {shards} batch shards (mesh.data x "
            f"mesh.fsdp) x {grad_accumulation_steps=}."
        )


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of the global batch that this process feeds, sorted."""
    slices = batch_sharding(mesh).devices_indices_map((batch_size,))
    rows = [np.arange(batch_size)[slices[device]] for device in mesh.local_devices]
    return np.unique(np.concatenate(rows))


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Global arrays from each process's `local_rows`."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def map_groups(mesh: Mesh, f: Callable, x: jax.Array, at_once: int) -> jax.Array:
    """f(x) for x [B, ...], computed for a group of rows after another, to bound the memory.

    Every device's rows stay where they are. For use inside jit, where f is a function of each row.

    Args: at_once, the most rows of a group on each device; a group is the largest that divides
      the device's rows, which B must give every device alike.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = next(n for n in range(at_once, 0, -1) if x.shape[0] // shards % n == 0)
    groups = x.reshape(shards, -1, rows, *x.shape[1:]).swapaxes(0, 1)
    groups = groups.reshape(-1, shards * rows, *x.shape[1:])
    grouped = NamedSharding(mesh, PartitionSpec(None, *BATCH))
    groups = jax.lax.with_sharding_constraint(groups, grouped)
    y = jax.lax.map(f, groups)
    y = y.reshape(-1, shards, rows, *y.shape[2:]).swapaxes(0, 1)
    return y.reshape(-1, *y.shape[3:])


def together(f: Callable):
    """f() in every process; where it raises in one it ends all: they would wait for that one.

    Raises: the process's own error; OSError where only others failed.
    """
    result, failure = None, None
    try:
        result = f()
    except Exception as error:  # of any kind
        failure = error
    if not all_processes(failure is None):
        raise failure or OSError(
            "another process failed: see its output; run the same command again."
        )
    return result


def all_processes(ok: bool) -> bool:
    """Whether it is so in every process; all of them must ask."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.array(ok))))


def from_first_process(text: str) -> str:
    """The first process's text, in every process; all of them must ask."""
    if jax.process_count() == 1:
        return text
    encoded = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(encoded))))
    encoded = encoded if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(encoded)).tobytes().decode()


def in_first_process(act: Callable[[], None], message: str) -> None:
    """Calls act() in the first process.

    Raises: OSError in all processes alike, with the message, if act did: so none waits for it.
    """
    problem, failure = "", None
    if jax.process_index() == 0:
        try:
            act()
        except OSError as error:
            problem, failure = f"{message}: {error}", error
    if problem := from_first_process(problem):
        raise OSError(problem) from failure
