"""Properties of config keys: ranges, values for older configs, and which keys may change.

configs/default.py has the default and the unit of each key.
"""

import dataclasses
from collections.abc import Mapping

from ml_collections import ConfigDict

from dit_jax.config import ranges, sizes
from dit_jax.errors import UserError

NO_VALUE = object()


@dataclasses.dataclass(frozen=True)
class Key:
    """Properties of a config key; a key that is not in KEYS has the defaults."""

    range: ranges.Range | None = None  # of the key's number, or of each number in its list
    is_list: bool = False  # the value is a tuple or list of numbers
    optional: bool = False  # the value may be None
    old: object = NO_VALUE  # value for configs of versions that did not have the key
    # Whether a resumed run may have another value: up to rounding, the training is the same.
    may_change: bool = False
    is_path: bool = False  # the path exists on one machine only, so it is published empty


KEYS: dict[str, Key] = {
    "seed": Key(ranges.Range(0, ranges.MAX_SEED, whole=True)),
    "init_from": Key(old="", is_path=True),
    "total_steps": Key(ranges.COUNT, may_change=True),
    "batch_size": Key(ranges.COUNT),
    "grad_accumulation_steps": Key(ranges.COUNT),
    "log_every_steps": Key(ranges.COUNT, may_change=True),
    "eval_every_steps": Key(ranges.FROM_0, may_change=True),
    "eval_draws": Key(ranges.Range(1, 10**6, whole=True), old=1),
    "sample_every_steps": Key(ranges.FROM_0, may_change=True),
    "sample_num_images": Key(
        ranges.Range(1, ranges.MAX_PICTURE_IMAGES, whole=True), old=16, may_change=True
    ),
    "checkpoint_every_steps": Key(ranges.COUNT, may_change=True),
    # At least two: if the newest checkpoint is damaged, the one before it is loaded.
    "checkpoint_keep": Key(ranges.FROM_2, may_change=True),
    "checkpoint_keep_every_steps": Key(ranges.FROM_0, may_change=True),
    "checkpoint_best_metric": Key(old="", may_change=True),
    "profile_start_step": Key(ranges.FROM_0, may_change=True),
    "profile_num_steps": Key(ranges.COUNT, may_change=True),
    "optim.name": Key(old="adamw"),
    "optim.learning_rate": Key(ranges.Range(0, 100, without_low=True)),
    "optim.warmup_steps": Key(ranges.FROM_0),
    "optim.b1": Key(ranges.BELOW_1),
    "optim.b2": Key(ranges.BELOW_1),
    "optim.eps": Key(ranges.NOT_NEGATIVE),
    "optim.weight_decay": Key(ranges.NOT_NEGATIVE),
    "optim.grad_clip_norm": Key(ranges.NOT_NEGATIVE),
    "optim.mup_base_width": Key(ranges.FROM_0, old=0),
    "optim.ema_decay": Key(ranges.BELOW_1),
    "data.data_dir": Key(is_path=True, may_change=True),
    "data.image_size": Key(ranges.IMAGE_SIZE),
    "data.caption_feature": Key(old=""),
    "data.captions_per_image": Key(ranges.Range(1, 1024, whole=True), old=1),
    "data.cache": Key(may_change=True),
    "data.num_workers": Key(ranges.Range(0, 1024, whole=True), may_change=True),
    "data.num_threads": Key(ranges.Range(0, 1024, whole=True), may_change=True),
    "data.prefetch_batches": Key(ranges.Range(0, 10**6, whole=True), may_change=True),
    "mesh.data": Key(ranges.Range(-1, ranges.MAX_COUNT, whole=True)),
    "mesh.fsdp": Key(ranges.Range(-1, ranges.MAX_COUNT, whole=True)),
    "mesh.tensor": Key(ranges.Range(-1, ranges.MAX_COUNT, whole=True)),
    "model.input_size": Key(ranges.IMAGE_SIZE),
    "model.patch_size": Key(ranges.IMAGE_SIZE),
    "model.in_channels": Key(ranges.SIZE),
    "model.hidden_size": Key(ranges.SIZE),
    "model.depth": Key(ranges.Range(1, 1000, whole=True)),
    # 0: a UNet computes the number of heads from head_dim.
    "model.num_heads": Key(ranges.SIZE_OR_0),
    "model.mlp_ratio": Key(ranges.Range(0, 100, without_low=True)),
    "model.block": Key(old="adaLN-Zero"),
    "model.attention": Key(may_change=True),
    "model.remat": Key(may_change=True),
    "model.scan_unroll": Key(may_change=True),
    "model.base_channels": Key(ranges.SIZE),
    "model.channel_mult": Key(ranges.Range(0, 100, without_low=True), is_list=True),
    "model.blocks_per_level": Key(ranges.Range(1, 100, whole=True)),
    "model.attention_levels": Key(ranges.Range(0, 100, whole=True), is_list=True),
    "model.transformer_depth": Key(ranges.Range(0, 100, whole=True)),
    "model.head_dim": Key(ranges.SIZE_OR_0),
    "model.norm_groups": Key(ranges.SIZE),
    "model.norm_epsilon": Key(ranges.Range(0, 1, without_low=True)),
    "model.dropout": Key(ranges.BELOW_1),
    "model.condition": Key(old="label"),
    "model.num_classes": Key(ranges.Range(0, 2**24, whole=True)),
    "model.context_size": Key(ranges.SIZE_OR_0, old=0),
    # At least two ids: padding and one word.
    "model.text_vocab_size": Key(ranges.Range(2, 2**24, whole=True), old=4096),
    "model.text_length": Key(ranges.SIZE, old=32),
    "model.text_depth": Key(ranges.Range(1, 1000, whole=True), old=2),
    "model.text_num_heads": Key(ranges.SIZE, old=4),
    "model.image_channels": Key(ranges.SIZE),
    "model.latent_channels": Key(ranges.SIZE),
    "model.block_channels": Key(ranges.SIZE, is_list=True),
    "model.layers_per_block": Key(ranges.Range(1, 100, whole=True)),
    "model.vocab_size": Key(ranges.Range(1, 2**24, whole=True)),
    "model.length": Key(ranges.SIZE),
    "model.mlp_size": Key(ranges.SIZE),
    "autoencoder.kl_weight": Key(ranges.Range(0, 1e6)),
    "autoencoder.lpips_weight": Key(ranges.Range(0, 1e6), old=0.0),
    "autoencoder.lpips": Key(old="", is_path=True, may_change=True),
    "diffusion.process": Key(old="ddpm"),
    "diffusion.num_steps": Key(ranges.Range(2, 10**6, whole=True)),
    "diffusion.schedule": Key(old="linear"),
    "diffusion.beta_start": Key(ranges.INSIDE_0_1),
    "diffusion.beta_end": Key(ranges.INSIDE_0_1),
    "diffusion.zero_terminal_snr": Key(old=False),
    "diffusion.sigma_min": Key(ranges.SIGMA, old=0.002),
    "diffusion.sigma_max": Key(ranges.SIGMA, old=80.0),
    "diffusion.sigma_data": Key(ranges.SIGMA, old=1.0),
    "objective.prediction": Key(old="eps"),
    "objective.weight": Key(old="uniform"),
    "objective.snr_gamma": Key(ranges.POSITIVE, old=5.0),
    "objective.p2_gamma": Key(ranges.Range(0, 100), old=1.0),
    "objective.t_distribution": Key(old="uniform"),
    "objective.t_mean": Key(ranges.Range(-100, 100), old=0.0),
    "objective.t_std": Key(ranges.Range(0, 100, without_low=True), old=1.0),
    "objective.low_discrepancy": Key(old=False),
    "objective.condition_dropout": Key(ranges.BELOW_1, old=0.1),
    "objective.min_t": Key(ranges.BELOW_1, old=1e-05),
    "latents.moments": Key(is_path=True, may_change=True),
    "latents.vae": Key(is_path=True, may_change=True),
    "latents.scale": Key(ranges.POSITIVE, is_list=True),
    "latents.shift": Key(ranges.ANY, is_list=True),
    "sample.steps": Key(ranges.Range(1, 10**6, whole=True)),
    "sample.grid": Key(old="uniform"),
    "sample.rho": Key(ranges.POSITIVE, old=7.0),
    "sample.shift": Key(ranges.POSITIVE, old=3.0),
    "sample.variance": Key(old="large"),
    "sample.eta": Key(ranges.SHARE),
    "sample.churn": Key(ranges.NOT_NEGATIVE, old=0.0),
    "sample.churn_range": Key(old=(0.0, 1000000000.0)),
    "sample.churn_noise": Key(ranges.Range(0, 100, without_low=True), old=1.0),
    "sample.sde_diffusion": Key(old="sigma"),
    "sample.last_step": Key(old="mean"),
    "sample.last_step_t": Key(ranges.BELOW_1, optional=True, old=None),
    "sample.clip_x_0": Key(old=False),
    "sample.cfg_scale": Key(ranges.GUIDANCE),
    "sample.cfg_channels": Key(ranges.SIZE_OR_0),
    "sample.cfg_interval": Key(ranges.SHARE, is_list=True, old=(0.0, 1.0)),
    "sample.cfg_rescale": Key(ranges.SHARE, old=0.0),
    "fid.every_steps": Key(ranges.FROM_0, old=0),
    "fid.num_images": Key(ranges.FROM_2, old=5000),
    "fid.steps": Key(ranges.Range(1, 10**6, whole=True), old=50),
    "fid.cfg_scale": Key(ranges.GUIDANCE, old=1.0),
    "fid.reference": Key(old="", is_path=True),
    "fid.extractor": Key(old=""),
    "fid.weights": Key(old="", is_path=True),
    # Keys of a sweep's config, experiments/scaling/configs/default.py.
    "evaluate.num": Key(ranges.FROM_0),
    "evaluate.seed": Key(ranges.Range(0, ranges.MAX_SEED, whole=True)),
    "evaluate.batch_size": Key(ranges.FROM_0),
    "slurm.timeout_min": Key(ranges.COUNT),
    "slurm.nodes": Key(ranges.COUNT),
    "slurm.tasks_per_node": Key(ranges.COUNT),
    "slurm.gpus_per_node": Key(ranges.FROM_0),
    "slurm.cpus_per_task": Key(ranges.COUNT),
    "slurm.mem_gb": Key(ranges.FROM_0),
    "slurm.jobs_at_once": Key(ranges.COUNT),
    "text.encoder": Key(old="", is_path=True, may_change=True),
    "text.encoder_digest": Key(old=""),
    "text.stored": Key(old=False),
}
# Sections whose keys may all change when a run is resumed.
CHANGING_SECTIONS = ("mesh", "sample", "fid")


def may_change(key: str) -> bool:
    """Returns whether a key, such as 'model.remat', may change when a run is resumed."""
    return KEYS.get(key, Key()).may_change or key.partition(".")[0] in CHANGING_SECTIONS


def check(config: ConfigDict | Mapping, prefix: str = "") -> None:
    """Checks that every number in a config is in the range of its key.

    Args:
      prefix: '' for a whole config; the key of the section, such as 'model', for a section.
    Raises: ValueError with the key, the value and the range.
    """
    for name, value in config.items():
        key = f"{prefix}.{name}" if prefix else name
        if key in KEYS and KEYS[key].range:
            _check_value(key, value)
        elif isinstance(value, ConfigDict | Mapping):
            check(value, key)


def _check_value(key, value):
    """Checks the value of a key with a range: each number must be in the range and in float32."""
    valid = KEYS[key].range
    if value is None and KEYS[key].optional:
        return
    shown = f"{key}={ranges.shorten(value)}"
    if key in sizes.KEYS:
        check_type(key, value, int)
        numbers = sizes.sides(value)
    else:
        numbers = value if KEYS[key].is_list else (value,)
    if not isinstance(numbers, tuple | list):
        raise UserError(f"{shown} must be a list; each of its values must be {valid}.")
    if not all(map(valid.holds, numbers)):
        raise UserError(f"{shown} must be {valid}.")
    if any(map(valid.rounds_to_high, numbers)):
        raise UserError(f"{shown} is {valid.high:g} in float32, but must be {valid}.")
    # Accelerators turn denormal numbers into 0, and numbers above LARGEST into infinity.
    if any(number and not ranges.SMALLEST <= abs(number) <= ranges.LARGEST for number in numbers):
        raise UserError(f"{shown} is 0 or infinite in float32.")


# {type: its name in messages}
TYPE_NAMES = {str: "a str", bool: "a bool", int: "a whole number", float: "a number"}


def check_type(key: str, value: object, kind: type, many: bool = False) -> None:
    """Checks the type of a value, before `check` tests its range.

    For the types int and float, the value may be an int or a float: `check` tests which are whole.

    Args:
      key: the key of the value; for the keys in `sizes.KEYS`, the value must be a size.
      kind: a key of TYPE_NAMES.
      many: whether the value must be a list or tuple of numbers.
    Raises: ValueError with the key, the value and the type.
    """
    types = (int, float) if kind in (int, float) else (kind,)
    if key in sizes.KEYS:
        fits, expected = sizes.is_size(value), "a whole number, or (height, width)"
    elif many:
        fits = isinstance(value, list | tuple) and all(type(item) in types for item in value)
        expected = "a list of numbers"
    else:
        fits, expected = type(value) in types, TYPE_NAMES.get(kind)
    if not fits:
        raise UserError(f"{key}={ranges.shorten(value)} must be {expected}.")
