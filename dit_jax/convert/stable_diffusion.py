"""Readers of a whole Stable Diffusion in diffusers' format: its list of parts, its scheduler."""

import pathlib
from typing import NamedTuple

from ml_collections import ConfigDict

from dit_jax.convert import array_names, fields, tensor_files
from dit_jax.errors import UserError
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
# Schedulers of models that were trained with a chain of noise levels. Their way of sampling is
# ignored, since this project's samplers replace them.
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
MAX_STEPS = 100_000
# diffusers' name -> this project's name.
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x_0"}
# Field of a scheduler's config -> its supported values.
CHOICES = dict(
    _class_name=SCHEDULERS,
    beta_schedule=SCHEDULES,
    prediction_type=PREDICTIONS,
    timestep_spacing=("leading", "linspace", "trailing"),
    trained_betas=(None,),
    use_flow_sigmas=(False,),
    set_alpha_to_one=(True, False),
    rescale_betas_zero_snr=(True, False),
)
# Values of the fields that a scheduler's config may leave out.
DEFAULTS = dict(
    prediction_type="epsilon",
    rescale_betas_zero_snr=False,
    timestep_spacing="leading",
    trained_betas=None,
    use_flow_sigmas=False,
)


class Process(NamedTuple):
    """The process that a model was trained with, and a sampler for it."""

    diffusion: dict  # keys of `config.diffusion`
    prediction: str
    sample: dict  # keys of `config.sample`


def check_parts(source: pathlib.Path) -> None:
    """Raises unless model_index.json describes a supported Stable Diffusion.

    Raises: FileNotFoundError; ValueError for a file, another pipeline, or missing or unsupported
      parts; as `fields.read`.
    """
    # A single file of the original code gets another message than a missing directory.
    if source.is_file():
        array_names.refuse_original_code(tensor_files.describe(source), "sd", source)
    path = source / INDEX
    description = (
        f"the list of parts in the directory that diffusers wrote, with {', '.join(PARTS)}"
    )
    index = fields.read(path, description)
    fields.check_class(path, index.get("_class_name"), PIPELINES)
    # A part is [library, class]. An optional part that is absent is [null, null].
    parts = {name for name, part in index.items() if isinstance(part, list) and part and part[-1]}
    unsupported = {name: "a part of this name" for name in PARTS if name not in parts}
    unsupported |= {name: "no such part" for name in sorted(parts - {*PARTS, *IGNORED})}
    fields.check_supported(path, "a pipeline", index, unsupported)


def read_process(path: pathlib.Path) -> Process:
    """Returns the process that a scheduler's config describes.

    The sampler is DDIM, with the times and the last level of diffusers' DDIM and PNDM for this
    file. No grid here has the spacing 'linspace', which is ignored.
    Args:
      path: scheduler_config.json.
    Raises: FileNotFoundError; ValueError for unsupported fields, with what is supported; as
      `fields.read`.
    """
    config = fields.read(path, "the scheduler's config that diffusers writes with the pipeline")
    is_pndm = config.get("_class_name") == "PNDMScheduler"
    # The default of set_alpha_to_one depends on the class.
    config = DEFAULTS | {"set_alpha_to_one": not is_pndm} | config
    fields.check_supported(path, "a process", config, _list_unsupported(config))
    diffusion = dict(
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
        # If the last level has no signal, sampling must begin there. Leading times do not.
        grid = "uniform" if config["rescale_betas_zero_snr"] else "leading"
    # The grid 'uniform' contains the first level already, so a sample ends on data after it.
    ends_on_data = config["set_alpha_to_one"] or grid == "uniform"
    sample = dict(sampler="ddim" if ends_on_data else "ddim_level1", grid=grid)
    return Process(diffusion, PREDICTIONS[config["prediction_type"]], sample)


def check_fit(source: pathlib.Path, unet: ConfigDict, vae: ConfigDict, clip: ConfigDict) -> None:
    """Raises ValueError unless the models of these configs accept each other's outputs."""
    if (unet.context_size, unet.in_channels) != (clip.hidden_size, vae.latent_channels):
        raise UserError(
            f"the parts of {files.printable(source)} belong to different models: unet has "
            f"cross_attention_dim={unet.context_size} and in_channels={unet.in_channels}, but "
            f"text_encoder has hidden_size={clip.hidden_size}, and vae has latent_channels="
            f"{vae.latent_channels}. Download them again."
        )


def _list_unsupported(config):
    """Returns {field: supported values, as a text} of the fields with an unsupported value."""
    unsupported = fields.list_unsupported(config, {}, CHOICES)
    steps = config.get("num_train_timesteps")
    if not fields.is_count(steps, MAX_STEPS) or steps < 2:
        unsupported["num_train_timesteps"] = f"a whole number above 1, up to {MAX_STEPS:,}"
    start, end = (config.get(name) for name in ("beta_start", "beta_end"))
    if not isinstance(start, float) or not 0 < start < 1:
        unsupported["beta_start"] = "a number between 0 and 1"
    elif not isinstance(end, float) or not start <= end < 1:
        unsupported["beta_end"] = f"a number from beta_start={start} to 1"
    # At the last level x_t is pure noise, so eps does not determine x_0.
    if config["rescale_betas_zero_snr"] is True and config["prediction_type"] == "epsilon":
        unsupported["rescale_betas_zero_snr"] = "False, with prediction_type='epsilon'"
    return unsupported
