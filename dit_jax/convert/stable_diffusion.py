"""What diffusers says of a whole Stable Diffusion: its parts, its process, and that they fit."""

import pathlib

from ml_collections import ConfigDict

from dit_jax.convert import fields, weights
from dit_jax.errors import MissingFileError, UserError
from dit_jax.system import files

INDEX = "model_index.json"
SCHEDULER = "scheduler_config.json"
# They have the same parts, and differ by what they draw.
PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInpaintPipelineLegacy",
)
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
IGNORED = ("safety_checker", "feature_extractor")
# Of a model trained with a chain of levels; how they step is our samplers' business.
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
# Their names of what is ours.
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x_0"}
SPACINGS = ("leading", "linspace", "trailing")
# What a scheduler's config may leave out, and as what.
DEFAULTS = dict(
    prediction_type="epsilon",
    rescale_betas_zero_snr=False,
    timestep_spacing="leading",
    trained_betas=None,
    use_flow_sigmas=False,
)


def check_parts(source: pathlib.Path) -> None:
    """Demands that the directory holds a Stable Diffusion, by its model_index.json.

    Raises: FileNotFoundError; ValueError for a file, another pipeline, parts that lack or are not
      supported, or as `fields.read`.
    """
    path, shown = source / INDEX, files.printable(source / INDEX)
    if source.is_file():
        weights.refuse_layout(source, "sd")
    if not path.is_file():
        raise MissingFileError(
            f"no {shown}: give the directory that diffusers wrote, with {', '.join(PARTS)} in it."
        )
    theirs = fields.read(path, "the list of a pipeline's parts that diffusers writes")
    if (found := theirs.get("_class_name")) not in PIPELINES:
        raise UserError(
            f"{shown} describes diffusers' {fields.show(found)}, but only {', '.join(PIPELINES)} "
            "can be converted."
        )
    # A part is [library, class]; one that a pipeline may have and this one has not, [null, null].
    parts = {name: v[-1] for name, v in theirs.items() if isinstance(v, list) and v and v[-1]}
    if missing := [name for name in PARTS if name not in parts]:
        raise UserError(f"{shown} names no {', '.join(missing)}; needed are {', '.join(PARTS)}.")
    if others := sorted(parts.keys() - {*PARTS, *IGNORED}):
        others = files.list_some([f"{name} ({fields.show(parts[name])})" for name in others])
        raise UserError(
            f"{shown} has the parts {others}, which are not supported; supported: "
            f"{', '.join(PARTS)}, and without effect {', '.join(IGNORED)}."
        )


def read_process(path: pathlib.Path) -> tuple[dict, str, dict]:
    """What a scheduler_config.json says: keys of `config.diffusion`, prediction, `config.sample`.

    The sampler is DDIM, ending as diffusers' DDIM and PNDM of this file do, and at their times; but
    'linspace' is no grid of these.
    Raises: FileNotFoundError; ValueError for what is not supported, with what is, or as
      `fields.read`.
    """
    theirs = fields.read(path, "the scheduler's config that diffusers writes with the pipeline")
    is_pndm = theirs.get("_class_name") == "PNDMScheduler"
    theirs = DEFAULTS | {"set_alpha_to_one": not is_pndm} | theirs
    if wrong := _not_supported(theirs):
        lines = fields.list_wrong(theirs, wrong)
        raise UserError(f"{files.printable(path)} describes a process of another kind:\n{lines}")
    process = dict(
        process="ddpm",
        num_steps=theirs["num_train_timesteps"],
        schedule=SCHEDULES[theirs["beta_schedule"]],
        beta_start=float(theirs["beta_start"]),
        beta_end=float(theirs["beta_end"]),
        zero_terminal_snr=theirs["rescale_betas_zero_snr"],
    )
    if theirs["timestep_spacing"] == "trailing":
        grid = "trailing"
    else:  # without a signal at the last level samples must begin there
        grid = "uniform" if theirs["rescale_betas_zero_snr"] else "leading"
    # 'uniform' has the first level, where samples then cannot end.
    ends_on_data = theirs["set_alpha_to_one"] or grid == "uniform"
    sample = dict(sampler="ddim" if ends_on_data else "ddim_level1", grid=grid)
    return process, PREDICTIONS[theirs["prediction_type"]], sample


def check_fit(source: pathlib.Path, unet: ConfigDict, vae: ConfigDict, clip: ConfigDict) -> None:
    """Demands that the parts, given as their `config.model`, take what the others make.

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


def _not_supported(theirs):
    """{field: what is supported} of those that are not."""
    wrong = {}
    for name, known in (
        ("_class_name", SCHEDULERS),
        ("beta_schedule", SCHEDULES),
        ("prediction_type", PREDICTIONS),
        ("timestep_spacing", SPACINGS),
    ):
        if not isinstance(theirs.get(name), str) or theirs[name] not in known:
            wrong[name] = ", ".join(known)
    steps = theirs.get("num_train_timesteps")
    if not fields.is_count(steps, MOST_STEPS) or steps < 2:
        wrong["num_train_timesteps"] = f"a whole number above 1, up to {MOST_STEPS:,}"
    start, end = (theirs.get(name) for name in ("beta_start", "beta_end"))
    if not isinstance(start, float) or not 0 < start < 1:
        wrong["beta_start"] = "a number between 0 and 1"
    elif not isinstance(end, float) or not start <= end < 1:
        wrong["beta_end"] = f"a number from beta_start={start} to 1"
    if theirs["trained_betas"] is not None:
        wrong["trained_betas"] = "None, a beta_schedule instead"
    if theirs["use_flow_sigmas"]:
        wrong["use_flow_sigmas"] = "False"
    if not isinstance(theirs["set_alpha_to_one"], bool):
        wrong["set_alpha_to_one"] = "True, False"
    if not isinstance(rescaled := theirs["rescale_betas_zero_snr"], bool):
        wrong["rescale_betas_zero_snr"] = "True, False"
    elif rescaled and theirs["prediction_type"] == "epsilon":
        # At the last level x_t is eps, of which x_0 cannot be told.
        wrong["rescale_betas_zero_snr"] = "False, with prediction_type='epsilon'"
    return wrong
