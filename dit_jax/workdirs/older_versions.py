"""Migration of configs that older versions wrote to the current keys."""

from dit_jax.config import ranges
from dit_jax.errors import UserError

CONDITION_DROPOUT = 0.1  # the dropout for configs that have none
# Keys that older versions did not have. Each value reproduces the behaviour of those versions.
OLD_DEFAULTS = {
    "init_from": "",
    "eval_draws": 1,
    "sample_num_images": 16,
    "checkpoint_best_metric": "",
    "optim.name": "adamw",
    "optim.mup_base_width": 0,
    "data.caption_feature": "",
    "data.captions_per_image": 1,
}
OLD_VAE_DEFAULTS = {"autoencoder.lpips": "", "autoencoder.lpips_weight": 0.0}
OLD_DIT_DEFAULTS = {"model.block": "adaLN-Zero"}
OLD_PREDICTOR_DEFAULTS = {
    "model.condition": "label",
    "model.context_size": 0,
    "model.text_vocab_size": 4096,
    "model.text_length": 32,
    "model.text_depth": 2,
    "model.text_num_heads": 4,
    "text.encoder": "",
    "text.encoder_digest": "",
    "text.stored": False,
    "diffusion.process": "ddpm",
    "diffusion.schedule": "linear",
    "diffusion.zero_terminal_snr": False,
    "diffusion.sigma_min": 0.002,
    "diffusion.sigma_max": 80.0,
    "diffusion.sigma_data": 1.0,
    "objective.prediction": "eps",
    "objective.weight": "uniform",
    "objective.snr_gamma": 5.0,
    "objective.p2_gamma": 1.0,
    "objective.t_distribution": "uniform",
    "objective.t_mean": 0.0,
    "objective.t_std": 1.0,
    "objective.low_discrepancy": False,
    "objective.min_t": 1e-5,
    "objective.condition_dropout": CONDITION_DROPOUT,
    "sample.grid": "uniform",
    "sample.rho": 7.0,
    "sample.shift": 3.0,
    "sample.variance": "large",
    "sample.churn": 0.0,
    "sample.churn_range": (0.0, 1e9),
    "sample.churn_noise": 1.0,
    "sample.sde_diffusion": "sigma",
    "sample.last_step": "mean",
    "sample.last_step_t": None,
    "sample.clip_x_0": False,
    "sample.cfg_interval": (0.0, 1.0),
    "sample.cfg_rescale": 0.0,
    "fid.every_steps": 0,
    "fid.num_images": 5000,
    "fid.steps": 50,
    "fid.cfg_scale": 1.0,
    "fid.reference": "",
    "fid.extractor": "",
    "fid.weights": "",
}
# The sections that this module looks into.
SECTIONS = {"model", "optim", "data", "latents", "autoencoder"}
SECTIONS |= {"text", "diffusion", "objective", "sample", "fid"}


def check_section(key, value):
    """Raises a ValueError unless the value of a section is an object with keys."""
    if not isinstance(value, dict) or not value:
        raise UserError(f"{key}={ranges.shorten(value)} must be an object of keys.")


def complete(config: dict) -> dict:
    """Returns a config with all current keys: missing ones are added, old ones are converted.

    The config is changed in place.
    Raises: ValueError for a section that is no object.
    """
    # The config is not validated yet. Its sections must be objects before anything looks into them.
    for section in SECTIONS & config.keys():
        check_section(section, config[section])
    if config.keys() == {"model"}:  # a converted network has no other sections
        return config
    name = config["model"].get("name")
    older = OLD_DEFAULTS | (OLD_VAE_DEFAULTS if name == "vae" else OLD_PREDICTOR_DEFAULTS)
    if name == "dit":
        older |= OLD_DIT_DEFAULTS
    if name != "vae":
        _split_dropout(config)
    if "sample" in config:
        config["sample"] = upgrade_sample(config["sample"])
    latents = config.get("latents", {})
    for key in ("scale", "shift"):  # the first versions had one number instead of a list
        if isinstance(latents.get(key), int | float):
            latents[key] = [latents[key]]
    # setdefault: the keys that the config has stay as they are.
    for key, value in older.items():
        section, _, name = key.rpartition(".")
        (config.setdefault(section, {}) if section else config).setdefault(name, value)
    return config


def _split_dropout(config):
    """Replaces `model.class_dropout_prob`, in place, with two keys.

    They are `model.null_condition` and `objective.condition_dropout`. The old key was 0 for a model
    without a null class. Then the dropout has no effect, and `complete` adds its default.
    """
    if "class_dropout_prob" in config["model"]:
        prob = config["model"].pop("class_dropout_prob")
        ranges.check_type("model.class_dropout_prob", prob, float)
        if not 0 <= prob < 1:
            raise UserError(f"model.class_dropout_prob={prob} must be a number in [0, 1).")
        config["model"].setdefault("null_condition", prob > 0)
        if prob > 0:
            config.setdefault("objective", {}).setdefault("condition_dropout", prob)


def upgrade_sample(sample: dict) -> dict:
    """Returns sample settings with current keys instead of old ones.

    `last_step_size` became `last_step_t`, the time at which the last step begins; 0 stood for the
    default, which is None now. `num_images`, for pictures during training, is now a key outside of
    `config.sample`.

    Args:
      sample: `config.sample`, or the settings in a row of evaluations.jsonl.
    """
    sample = dict(sample)
    sample.pop("num_images", None)
    if "last_step_size" in sample:
        sample["last_step_t"] = sample.pop("last_step_size") or None
    return sample
