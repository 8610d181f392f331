"""A trained model, loaded from its workdir with its VAE, guide and text encoder for sampling."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import flax.linen as nn
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dit_jax import conditions, diffusion, latents, models, sharding, workdirs
from dit_jax.config import keys
from dit_jax.diffusion import edits, samplers
from dit_jax.errors import UserError
from dit_jax.sampling import generate
from dit_jax.system import files
from dit_jax.workdirs import checkpoint

# Flag for the workdir of a frozen network -> (section and key in the config, name of the network).
FROZEN = {
    "vae": (("latents", "vae"), "a VAE"),
    "text_encoder": (("text", "encoder"), "a frozen text encoder"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A trained model with its parameters on a mesh of all devices."""

    config: ConfigDict
    step: int
    raw: bool  # whether `params` are the trained parameters instead of their EMA
    mesh: Mesh
    model: nn.Module
    process: diffusion.Process
    params: dict
    to_image: Callable  # x_0 [B, h, w, C] f32 to images [B, H, W, channels] uint8
    vae: latents.Vae | None = None  # decodes x_0; None for a model of pixels
    guide: "Guide | None" = None
    encoder: conditions.TextEncoder | None = None  # the frozen text encoder, if the model uses one
    data: dict = dataclasses.field(default_factory=dict)  # from `workdirs.load_data`

    @property
    def condition(self) -> conditions.Condition:
        """The kind of condition that the model takes."""
        return conditions.build(self.config)

    @property
    def class_names(self) -> list[str] | None:
        """The names of the classes, in order; None if they have no names."""
        return self.data.get("train", {}).get("classes")

    @property
    def vae_digest(self) -> str:
        """The digest of the VAE that decodes; '' for a model of pixels."""
        return self.vae.digest if self.vae else ""

    def make_request(self, num: int, seed: int = 0, **flags: str | list) -> conditions.Request:
        """Makes a request for `num` images from a command's flags.

        Raises: ValueError as `Condition.from_flags`, or for a negative prompt without effect.
        """
        request = self.condition.from_flags(num, seed, self.class_names, **flags)
        # A guide replaces the null condition, and scale 1 does not use it.
        negative = flags.get("negative_prompt")
        if negative and (self.guide or self.config.sample.cfg_scale == 1):
            reason = f"--guide={self.guide.workdir}" if self.guide else "cfg_scale=1"
            raise UserError(
                f"--negative_prompt={negative!r} has no effect with {reason}. Sample with "
                "--cfg_scale above 1 and without a guide."
            )
        return request

    def make_sample_fn(
        self, edit: type[edits.Edit] = edits.Edit, strength: float = 1.0
    ) -> Callable:
        """Returns `generate.make_sample_fn` of this model, with guide and text encoder bound."""
        prediction = self.config.objective.prediction
        arguments = self.model, self.config.sample, self.process, prediction, self.mesh
        guide, guide_params = (self.guide.model, self.guide.params) if self.guide else (None, None)
        sample = generate.make_sample_fn(*arguments, guide, edit, strength)
        return functools.partial(sample, encoder=self.encoder, guide_params=guide_params)

    def generate(
        self, request: conditions.Request, seed: int, sample: Callable | None = None, **options
    ) -> np.ndarray:
        """Samples the images [N, H, W, C] uint8 of a request; options as for `generate.generate`.

        Args: sample, from `make_sample_fn`, by default without an edit.
        """
        arguments = self.params, request, seed, self.mesh, self.to_image
        return generate.generate(sample or self.make_sample_fn(), *arguments, **options)


@dataclasses.dataclass(frozen=True, eq=False)
class Guide:
    """A worse model for autoguidance, on the same mesh as the better one."""

    workdir: str
    step: int
    model: nn.Module
    params: dict


def load(
    workdir: pathlib.Path,
    step: int | None = None,
    raw: bool = False,
    vae_workdir: pathlib.Path | None = None,
    encoder_workdir: pathlib.Path | None = None,
    settings: dict | None = None,
    guide_workdir: pathlib.Path | None = None,
    guide_step: int | None = None,
) -> Trained:
    """Loads a trained model from its workdir.

    Args:
      step: of the checkpoint, by default the newest.
      raw: whether to load the trained parameters instead of their EMA.
      vae_workdir, encoder_workdir: replace the run's own VAE and frozen text encoder.
      settings: values for keys of `config.sample`.
      guide_workdir, guide_step: choose a worse model for autoguidance. By default the workdir is
        the same one, and the step is the newest. The guide's parameters are the EMA.
    Raises: FileNotFoundError if the checkpoint does not exist; OSError if it cannot be read;
      ValueError if the model needs a VAE or text encoder that is missing, or does not use one that
      is given; ValueError for a guide with another input, process or prediction.
    """
    config = _load_config(workdir)
    condition, latent_kind = conditions.build(config), latents.build(config)
    _set_frozen(config, workdir, "vae", vae_workdir, latent_kind.uses_vae)
    _set_frozen(config, workdir, "text_encoder", encoder_workdir, condition.needs_encoder)
    # Settings are checked before parameters are loaded, which takes long.
    config.sample.update(settings or {})
    keys.check(config)
    samplers.check(config.sample)
    samplers.check_used(config.sample, settings or {}, config.model.learn_sigma)
    latent_kind.check_clip()
    mesh = sharding.make_mesh(config.mesh)
    model, params, step = _load_model(workdir, config, mesh, step, raw)
    vae = latent_kind.load_vae(mesh)
    to_image = latent_kind.make_to_image(vae, mesh)
    guide = None
    if guide_workdir or guide_step is not None:
        guide = _load_guide(config, guide_workdir or workdir, guide_step, mesh)
    process = diffusion.build(config.diffusion)
    encoder = condition.load_encoder(mesh)
    data = workdirs.load_data(workdir)
    arguments = config, step, raw, mesh, model, process, params, to_image, vae, guide, encoder, data
    return Trained(*arguments)


def _load_config(workdir):
    """Loads a workdir's config, changed to use all devices of this machine."""
    config = workdirs.load_config(workdir)
    workdirs.check_draws_images(workdir, config)
    _resolve_relative_paths(workdir, config)
    # The run may have used other devices, with an attention that these do not support.
    with config.unlocked():
        config.mesh = dict(data=-1, fsdp=1, tensor=1)
        config.model.attention = "auto"
    return config


def _resolve_relative_paths(workdir, config):
    """Resolves the paths of frozen networks relative to the workdir, if those directories exist.

    A workdir that `dit_jax.convert sd` wrote can therefore be moved.
    """
    for (section, key), _ in FROZEN.values():
        if value := config.get(section, {}).get(key):
            path = workdir / files.to_path(value, f"{section}.{key}")
            if path.is_dir():
                config[section][key] = str(path)


def _set_frozen(config, workdir, flag, path, is_used):
    """Sets the workdir of a frozen network to `path`, the value of its flag, unless it is None.

    Raises: ValueError if the model does not use the network, or if it needs one without a workdir.
    """
    (section, key), network = FROZEN[flag]
    if path and not is_used:
        raise UserError(f"{workdir} holds a model without {network}. Leave out --{flag}={path}.")
    if path:
        config[section][key] = str(path)
    if is_used and not config[section][key]:
        digest = config[section][f"{key}_digest"] or "not recorded"
        raise UserError(
            f"{workdir} holds a model that needs {network} with digest {digest}. Set --{flag} to "
            "its workdir; dit_jax.convert writes published networks."
        )


def _load_model(workdir, config, mesh, step, raw):
    """Loads a checkpoint; returns (model, its parameters sharded over the mesh, step)."""
    model = models.build(config.model)
    shapes = models.param_shapes(model)
    shapes = sharding.with_shardings(mesh, shapes)
    return model, *checkpoint.restore_params(workdir, shapes, step, raw)


def _load_guide(config, workdir, step, mesh):
    """Loads a guide, and checks that it fits the model of `config`."""
    guide_config = _load_config(workdir)
    _check_guide(guide_config, config, workdir)
    model, params, step = _load_model(workdir, guide_config, mesh, step, raw=False)
    return Guide(str(workdir), step, model, params)


def _check_guide(guide, config, workdir):
    """Raises ValueError unless the guide has the model's inputs, outputs and process."""

    def describe_interface(config):
        # The keys on which the meaning of a network's inputs and output depends.
        keys = ["input_size", "in_channels", *conditions.build(config).shared_keys]
        return {
            **{f"model.{key}": config.model[key] for key in keys},
            "diffusion": config.diffusion.to_dict(),
            "objective.prediction": config.objective.prediction,
            **{f"latents.{key}": config.latents[key] for key in ("vae_digest", "scale", "shift")},
        }

    actual, expected = describe_interface(guide), describe_interface(config)
    digests = guide.text.encoder_digest, config.text.encoder_digest
    if all(digests):  # '' is not known
        actual["text.encoder_digest"], expected["text.encoder_digest"] = digests
    if differing := [key for key in expected if actual[key] != expected[key]]:
        lines = [f"  {key}: guide {actual[key]!r}, model {expected[key]!r}" for key in differing]
        raise UserError(
            f"--guide={workdir} must be a model of the same inputs and outputs, but these keys "
            "differ:\n" + "\n".join(lines)
        )
