"""Types and ranges of the values in a config, checked before anything is read or compiled."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from dit_jax.config import sizes
from dit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Range:
    """Range of finite numbers from `low` to `high`, both included unless `without_...` is set."""

    low: float
    high: float = math.inf
    whole: bool = False  # whole numbers only
    without_low: bool = False
    without_high: bool = False

    def holds(self, value: object) -> bool:
        """Returns whether a value is a number in this range; True and False are no numbers."""
        kinds = int if self.whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            return False
        if isinstance(value, float) and not math.isfinite(value):
            return False
        above = self.low < value if self.without_low else self.low <= value
        return above and (value < self.high if self.without_high else value <= self.high)

    def rounds_to_high(self, number: float) -> bool:
        """Returns whether a number is below an excluded `high`, but not in float32."""
        return self.without_high and number < self.high <= np.float32(number)

    def __str__(self) -> str:
        """Returns 'a whole number in 0..10', 'a number in [0, 1)' or 'a number above 0'."""
        kind = "a whole number" if self.whole else "a number"
        if self.high == math.inf:
            return f"{kind} {'above' if self.without_low else 'of at least'} {self.low:g}"
        if self.whole:
            return f"{kind} in {self.low}..{self.high}"
        opening, closing = "(" if self.without_low else "[", ")" if self.without_high else "]"
        return f"{kind} in {opening}{self.low:g}, {self.high:g}{closing}"


# The smallest normal and the largest float32. All computations are in float32.
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
MAX_SEED = 2**32 - 1  # the largest seed that NumPy takes
MAX_COUNT = 2**31 - 1  # JAX counts steps and images in int32
MAX_IMAGE_SIZE = 2**13  # pixels of a side; its square is `pixels.MAX_ENLARGED`, a crop's limit
MAX_PICTURE_IMAGES = 10_000  # the most images in one picture
COUNT, FROM_0, FROM_2 = (Range(low, MAX_COUNT, whole=True) for low in (1, 0, 2))
SIZE, SIZE_OR_0 = (Range(low, 2**20, whole=True) for low in (1, 0))
IMAGE_SIZE = Range(1, MAX_IMAGE_SIZE, whole=True)
POSITIVE = Range(0, without_low=True)
NOT_NEGATIVE = Range(0)
SHARE, BELOW_1 = Range(0, 1), Range(0, 1, without_high=True)
SIGMA, GUIDANCE = Range(0, 1e6, without_low=True), Range(1, 1000)
INSIDE_0_1 = Range(0, 1, without_low=True, without_high=True)
ANY = Range(-math.inf)

RANGES = {
    "seed": Range(0, MAX_SEED, whole=True),
    "total_steps": COUNT,
    "batch_size": COUNT,
    "grad_accumulation_steps": COUNT,
    "log_every_steps": COUNT,
    "eval_every_steps": FROM_0,
    "eval_draws": Range(1, 10**6, whole=True),
    "sample_every_steps": FROM_0,
    "sample_num_images": Range(1, MAX_PICTURE_IMAGES, whole=True),
    "checkpoint_every_steps": COUNT,
    "checkpoint_keep": FROM_2,  # if the newest is damaged, the one before it is used
    "checkpoint_keep_every_steps": FROM_0,
    "profile_start_step": FROM_0,
    "profile_num_steps": COUNT,
    "optim.learning_rate": Range(0, 100, without_low=True),
    "optim.warmup_steps": FROM_0,
    "optim.b1": BELOW_1,
    "optim.b2": BELOW_1,
    "optim.eps": NOT_NEGATIVE,
    "optim.weight_decay": NOT_NEGATIVE,
    "optim.grad_clip_norm": NOT_NEGATIVE,
    "optim.mup_base_width": FROM_0,
    "optim.ema_decay": BELOW_1,
    "data.image_size": IMAGE_SIZE,
    "data.captions_per_image": Range(1, 1024, whole=True),
    "data.num_workers": Range(0, 1024, whole=True),
    "data.num_threads": Range(0, 1024, whole=True),
    "data.prefetch_batches": Range(0, 10**6, whole=True),
    "mesh.data": Range(-1, MAX_COUNT, whole=True),
    "mesh.fsdp": Range(-1, MAX_COUNT, whole=True),
    "mesh.tensor": Range(-1, MAX_COUNT, whole=True),
    "model.input_size": IMAGE_SIZE,
    "model.patch_size": IMAGE_SIZE,
    "model.in_channels": SIZE,
    "model.hidden_size": SIZE,
    "model.depth": Range(1, 1000, whole=True),
    "model.num_heads": SIZE_OR_0,  # 0: a UNet computes them from head_dim
    "model.head_dim": SIZE_OR_0,
    "model.mlp_ratio": Range(0, 100, without_low=True),
    "model.num_classes": Range(0, 2**24, whole=True),
    "model.context_size": SIZE_OR_0,
    "model.text_vocab_size": Range(2, 2**24, whole=True),  # at least padding and one word
    "model.text_length": SIZE,
    "model.text_depth": Range(1, 1000, whole=True),
    "model.text_num_heads": SIZE,
    "model.vocab_size": Range(1, 2**24, whole=True),
    "model.length": SIZE,
    "model.mlp_size": SIZE,
    "model.base_channels": SIZE,
    "model.channel_mult": Range(0, 100, without_low=True),
    "model.blocks_per_level": Range(1, 100, whole=True),
    "model.attention_levels": Range(0, 100, whole=True),
    "model.transformer_depth": Range(0, 100, whole=True),
    "model.norm_groups": SIZE,
    "model.norm_epsilon": Range(0, 1, without_low=True),
    "model.dropout": BELOW_1,
    "model.image_channels": SIZE,
    "model.latent_channels": SIZE,
    "model.block_channels": SIZE,
    "model.layers_per_block": Range(1, 100, whole=True),
    "autoencoder.kl_weight": Range(0, 1e6),
    "autoencoder.lpips_weight": Range(0, 1e6),
    "diffusion.num_steps": Range(2, 10**6, whole=True),
    "diffusion.beta_start": INSIDE_0_1,
    "diffusion.beta_end": INSIDE_0_1,
    "diffusion.sigma_min": SIGMA,
    "diffusion.sigma_max": SIGMA,
    "diffusion.sigma_data": SIGMA,
    "objective.snr_gamma": POSITIVE,
    "objective.p2_gamma": Range(0, 100),
    "objective.t_mean": Range(-100, 100),
    "objective.t_std": Range(0, 100, without_low=True),
    "objective.min_t": BELOW_1,
    "objective.condition_dropout": BELOW_1,
    "latents.scale": POSITIVE,
    "latents.shift": ANY,
    "sample.steps": Range(1, 10**6, whole=True),
    "sample.rho": POSITIVE,
    "sample.shift": POSITIVE,
    "sample.eta": SHARE,
    "sample.churn": NOT_NEGATIVE,
    "sample.churn_noise": Range(0, 100, without_low=True),
    "sample.last_step_t": BELOW_1,
    "sample.cfg_scale": GUIDANCE,
    "sample.cfg_channels": SIZE_OR_0,
    "sample.cfg_interval": SHARE,
    "sample.cfg_rescale": SHARE,
    "fid.every_steps": FROM_0,
    "fid.num_images": FROM_2,
    "fid.steps": Range(1, 10**6, whole=True),
    "fid.cfg_scale": GUIDANCE,
    # Keys of a sweep's config, experiments/scaling/configs/default.py.
    "evaluate.num": FROM_0,
    "evaluate.seed": Range(0, MAX_SEED, whole=True),
    "evaluate.batch_size": FROM_0,
    "slurm.timeout_min": COUNT,
    "slurm.nodes": COUNT,
    "slurm.tasks_per_node": COUNT,
    "slurm.gpus_per_node": FROM_0,
    "slurm.cpus_per_task": COUNT,
    "slurm.mem_gb": FROM_0,
    "slurm.jobs_at_once": COUNT,
}
# Keys whose values are tuples or lists; each of their numbers must be in the range.
LISTS = {"latents.scale", "latents.shift", "sample.cfg_interval"}
LISTS |= {f"model.{name}" for name in ("channel_mult", "attention_levels", "block_channels")}
OPTIONAL = {"sample.last_step_t"}  # keys that may be None


def check(config: ConfigDict | Mapping, prefix: str = "") -> None:
    """Raises unless every number of a config is in the range of its key.

    Args:
      prefix: the key of the section that `config` is, such as 'model'; '' for a whole config.
    Raises: ValueError with the key, the value and the range.
    """
    for name, value in config.items():
        key = f"{prefix}.{name}" if prefix else name
        if key in RANGES:
            _check_value(key, value)
        elif isinstance(value, ConfigDict | Mapping):
            check(value, key)


def _check_value(key, value):
    """Raises a ValueError unless the value of a key, or each of its values, is in the range."""
    if value is None and key in OPTIONAL:
        return
    shown = f"{key}={shorten(value)}"
    if key in sizes.KEYS:
        check_type(key, value, int)
        value = sizes.height_and_width(value)
    numbers = value if key in LISTS | sizes.KEYS else (value,)
    if not isinstance(numbers, tuple | list):
        raise UserError(f"{shown} must be a list, and each of its values {RANGES[key]}.")
    if not all(map(RANGES[key].holds, numbers)):
        raise UserError(f"{shown} must be {RANGES[key]}.")
    if any(map(RANGES[key].rounds_to_high, numbers)):
        raise UserError(f"{shown} is {RANGES[key].high:g} in float32, but must be {RANGES[key]}.")
    # Accelerators turn denormal numbers into 0; numbers above LARGEST become infinite.
    if any(number and not SMALLEST <= abs(number) <= LARGEST for number in numbers):
        raise UserError(f"{shown} is 0 or infinite in float32.")


# The names of types in messages.
TYPES = {str: "a str", bool: "a bool", int: "a whole number", float: "a number"}


def check_type(key: str, value: object, kind: type, many: bool = False) -> None:
    """Raises unless a value has the type `kind`, or is a size if the key is one of `sizes.KEYS`.

    An int may be given for a float and a float for an int; `check` looks for whole numbers.

    Args:
      kind: a key of TYPES.
      many: whether the value must be a list or tuple of such values.
    Raises: ValueError with the key, the value and the type.
    """
    types = (int, float) if kind in (int, float) else (kind,)
    if key in sizes.KEYS:
        fits, expected = sizes.is_size(value), "a whole number, or (height, width)"
    elif many:
        fits = isinstance(value, list | tuple) and all(type(one) in types for one in value)
        expected = "a list of numbers"
    else:
        fits, expected = type(value) in types, TYPES.get(kind)
    if not fits:
        raise UserError(f"{key}={shorten(value)} must be {expected}.")


def shorten(value: object) -> str:
    """Returns a value as one line of at most 103 characters, for messages."""
    # A ConfigDict's own repr has several lines.
    text = repr(value.to_dict() if isinstance(value, ConfigDict) else value)
    return text if len(text) <= 100 else f"{text[:100]}..."
