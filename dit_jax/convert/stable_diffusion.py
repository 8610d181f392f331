"""Readers of a whole Stable Diffusion in diffusers' format: its parts, its process, their fit."""

import pathlib

from ml_collections import ConfigDict

from dit_jax.convert import fields, weights
from dit_jax.errors import MissingFileError, UserError
from dit_jax.system import files

INDEX = "model_index.json"
SCHEDULER = "scheduler_config.json"
# These pipelines have the same parts, and differ in the task that they sample for.
PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInpaintPipelineLegacy",
)
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
# Parts that are not converted.
IGNORED = ("safety_checker", "feature_extractor")
# Schedulers of models that were trained with a chain of levels. How they step has no effect here:
# this project's samplers replace them.
SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
MOST_STEPS = 100_000
# diffusers' name -> this project's.
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x_0"}
SPACINGS = ("leading", "linspace", "trailing")
# Values of the fields that a scheduler's config may leave out.
DEFAULTS = dict(
    prediction_type="epsilon",
    rescale_betas_zero_snr=False,
    timestep_spacing="leading",
    trained_betas=None,
    use_flow_sigmas=False,
)


def check_parts(source: pathlib.Path) -> None:
    """Raises unless model_index.json says that the directory holds a supported Stable Diffusion.

    Raises: FileNotFoundError; ValueError for a file, another pipeline, or missing or unsupported
      parts; as `fields.read`.
    """
    path, shown = source / INDEX, files.printable(source / INDEX)
    # A single file of the original code gets a message of its own.
    if source.is_file():
        weights.refuse_layout(source, "sd")
    if not path.is_file():
        raise MissingFileError(
            f"no {shown}: give the directory that diffusers wrote, with {', '.join(PARTS)} in it."
        )
    index = fields.read(path, "the list of a pipeline's parts that diffusers writes")
    if (kind := index.get("_class_name")) not in PIPELINES:
        raise UserError(
            f"{shown} describes diffusers' {fields.show(kind)}, but only {', '.join(PIPELINES)} "
            "can be converted."
        )
    # A part is [library, class]. An optional part that is absent is [null, null].
    parts = {name: v[-1] for name, v in index.items() if isinstance(v, list) and v and v[-1]}
    if missing := [name for name in PARTS if name not in parts]:
        raise UserError(f"{shown} names no {', '.join(missing)}; needed are {', '.join(PARTS)}.")
    if others := sorted(parts.keys() - {*PARTS, *IGNORED}):
        others = files.list_some([f"{name} ({fields.show(parts[name])})" for name in others])
        raise UserError(
            f"{shown} has the parts {others}, which are not supported; supported: "
            f"{', '.join(PARTS)}, and without effect {', '.join(IGNORED)}."
        )


def read_process(path: pathlib.Path) -> tuple[dict, str, dict]:
    """Returns (keys of `config.diffusion`, prediction, keys of `config.sample`) of a scheduler.

    The sampler is DDIM. It ends where diffusers' DDIM and PNDM end with this file, and takes their
    times. No grid here has the spacing 'linspace': it has no effect.
    Args:
      path: scheduler_config.json.
    Raises: FileNotFoundError; ValueError for unsupported fields, with what is supported; as
      `fields.read`.
    """
    config = fields.read(path, "the scheduler's config that diffusers writes with the pipeline")
    is_pndm = config.get("_class_name") == "PNDMScheduler"
    # The default of set_alpha_to_one depends on the class.
    config = DEFAULTS | {"set_alpha_to_one": not is_pndm} | config
    if wrong := _not_supported(config):
        lines = fields.list_wrong(config, wrong)
        raise UserError(f"{files.printable(path)} describes a process of another kind:\n{lines}")
    process = dict(
        process="ddpm",
        num_steps=config["num_train_timesteps"],
        schedule=SCHEDULES[config["beta_schedule"]],
        beta_start=float(config["beta_start"]),
        beta_end=float(config["beta_end"]),
        zero_terminal_snr=config["rescale_betas_zero_snr"],
    )
    if config["timestep_spacing"] == "trailing":
        grid = "trailing"
    else:
        # Without signal at the last level, sampling must begin there, and leading times do not.
        grid = "uniform" if config["rescale_betas_zero_snr"] else "leading"
    # The grid 'uniform' contains the first level already, so that samples cannot end there.
    ends_on_data = config["set_alpha_to_one"] or grid == "uniform"
    sample = dict(sampler="ddim" if ends_on_data else "ddim_level1", grid=grid)
    return process, PREDICTIONS[config["prediction_type"]], sample


def check_fit(source: pathlib.Path, unet: ConfigDict, vae: ConfigDict, clip: ConfigDict) -> None:
    """Raises unless the parts, given as their `config.model`, accept each other's outputs.

    Raises: ValueError with the sizes that differ.
    """
    wrong = []
    if unet.context_size != clip.hidden_size:
        wrong.append(
            f"unet has cross_attention_dim={unet.context_size}, but text_encoder "
            f"hidden_size={clip.hidden_size}"
        )
    if unet.in_channels != vae.latent_channels:
        wrong.append(
            f"unet has in_channels={unet.in_channels}, but vae "
            f"latent_channels={vae.latent_channels}"
        )
    if wrong:
        raise UserError(
            f"the parts of {files.printable(source)} are not of one model: {'; '.join(wrong)}."
        )


def _not_supported(published):
    """Returns {field: what is supported} for the fields with unsupported values."""
    wrong = {}
    for name, choices in (
        ("_class_name", SCHEDULERS),
        ("beta_schedule", SCHEDULES),
        ("prediction_type", PREDICTIONS),
        ("timestep_spacing", SPACINGS),
    ):
        if not isinstance(published.get(name), str) or published[name] not in choices:
            wrong[name] = ", ".join(choices)
    steps = published.get("num_train_timesteps")
    if not fields.is_count(steps, MOST_STEPS) or steps < 2:
        wrong["num_train_timesteps"] = f"a whole number above 1, up to {MOST_STEPS:,}"
    start, end = (published.get(name) for name in ("beta_start", "beta_end"))
    if not isinstance(start, float) or not 0 < start < 1:
        wrong["beta_start"] = "a number between 0 and 1"
    elif not isinstance(end, float) or not start <= end < 1:
        wrong["beta_end"] = f"a number from beta_start={start} to 1"
    if published["trained_betas"] is not None:
        wrong["trained_betas"] = "None, a beta_schedule instead"
    if published["use_flow_sigmas"]:
        wrong["use_flow_sigmas"] = "False"
    if not isinstance(published["set_alpha_to_one"], bool):
        wrong["set_alpha_to_one"] = "True, False"
    if not isinstance(zero_snr := published["rescale_betas_zero_snr"], bool):
        wrong["rescale_betas_zero_snr"] = "True, False"
    elif zero_snr and published["prediction_type"] == "epsilon":
        # At the last level x_t is pure noise, so that predicted eps does not determine x_0.
        wrong["rescale_betas_zero_snr"] = "False, with prediction_type='epsilon'"
    return wrong
