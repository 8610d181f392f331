"""What the commands share: the --config flag, its errors, log lines, several processes."""

import io
import logging
import os
import pathlib
import sys
import traceback
from collections.abc import Callable

import absl.logging
import jax
from absl import app, flags
from ml_collections import config_flags

from dit_jax import compilation_cache

FLAGS = flags.FLAGS
logger = logging.getLogger("dit_jax")


def define_config(required: bool = True) -> None:
    """--config FILE[:ARG] and --config.key=value, locked."""
    config_flags.DEFINE_config_file("config", None, "FILE[:ARG] of the config.", lock_config=True)
    if required:
        flags.mark_flag_as_required("config")


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))


def _bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


# Keys of config.sample: the type of a flag's text, and its help.
SAMPLING = {
    "sampler": (
        str,
        "ddpm, ddim, ddim_level1, dpmpp1, dpmpp2m, dpmpp2m_sde, euler, heun, ab2, ab4 or "
        "euler_maruyama.",
    ),
    "steps": (int, "Sampling steps."),
    "grid": (str, "uniform, quadratic, karras, shifted; ddpm: more, see configs/default.py."),
    "rho": (float, "grid karras: its exponent."),
    "shift": (float, "grid shifted: its factor."),
    "variance": (str, "sampler ddpm, without a learned one: large or small."),
    "eta": (float, "sampler ddim, ddim_level1: 0 deterministic, 1 DDPM's variance."),
    "churn": (float, "sampler heun: S_churn of EDM."),
    "churn_range": (_floats, "LOW,HIGH of sigma / alpha where it churns."),
    "churn_noise": (float, "Deviation of that noise."),
    "sde_diffusion": (str, "sampler euler_maruyama: sigma or sbdm."),
    "last_step": (str, "sampler euler_maruyama: mean, euler, tweedie or none."),
    "last_step_t": (
        float,
        "Time at which that step begins; with none, at which sampling ends; 0 leaves it out.",
    ),
    "clip_x_0": (_bool, "true or false: of pixels, keep x_0 in [-1, 1] in every step."),
    "cfg_scale": (float, "Guidance; 1 is none."),
    "cfg_channels": (int, "Guided channels; 0 all, the paper's samples use 3."),
    "cfg_interval": (
        _floats,
        "LOW,HIGH of the times t that are guided; of process edm t = sigma / sigma_max.",
    ),
    "cfg_rescale": (float, "0..1: how far guided outputs keep the deviation of unguided ones."),
}


def define_sampling(required: bool = True) -> None:
    """--workdir and which checkpoint, seed and sampler to use there."""
    flags.DEFINE_string("workdir", None, "Directory of a training run.", required=required)
    flags.DEFINE_integer("step", None, "Checkpoint; the newest by default.")
    flags.DEFINE_string("vae", None, "Workdir of the VAE that decodes; the run's by default.")
    flags.DEFINE_string(
        "text_encoder", None, "Workdir of the frozen encoder of captions; the run's by default."
    )
    flags.DEFINE_bool("raw", False, "The trained parameters instead of their EMA.")
    flags.DEFINE_string("guide", None, "Workdir of a worse model that guides: autoguidance.")
    flags.DEFINE_integer(
        "guide_step", None, "Checkpoint of --guide, or an earlier one of --workdir to guide it."
    )
    flags.DEFINE_integer(
        "seed", 0, "Image i is a function of the model, the seed, i and its label."
    )
    for name, (_, text) in SAMPLING.items():
        flags.DEFINE_string(name, None, f"{text} By default the run's.")


def define_told() -> None:
    """What the images are told: labels or prompts, and what guidance leads away from."""
    flags.DEFINE_string(
        "labels", "", "Comma-separated classes in equal shares; empty is all; or random."
    )
    flags.DEFINE_multi_string("prompt", [], "Caption, of a model of captions; may be repeated.")
    flags.DEFINE_string("negative_prompt", "", "What guidance leads away from.")


def loading() -> dict:
    """The arguments of `runs.load` that the flags ask for.

    Raises: ValueError for a number that is none.
    """
    settings = {}
    for name, (kind, _) in SAMPLING.items():
        if (text := FLAGS[name].value) is None:
            continue
        try:
            settings[name] = kind(text)
        except ValueError:
            shape = {_floats: "numbers with commas, such as 0.1,0.8", int: "a whole number"}
            shape |= {_bool: "true or false"}
            message = f"--{name}={text!r} must be {shape.get(kind, 'a number')}."
            raise ValueError(message) from None
    return dict(
        workdir=pathlib.Path(FLAGS.workdir),
        step=FLAGS.step,
        raw=FLAGS.raw,
        vae_workdir=FLAGS.vae,
        encoder_workdir=FLAGS.text_encoder,
        settings=settings,
        guide_workdir=FLAGS.guide and pathlib.Path(FLAGS.guide),
        guide_step=FLAGS.guide_step,
    )


def check_out(out: pathlib.Path, suffixes: tuple[str, ...], name: str = "--out=") -> None:
    """Demands now, rather than after the work, that --out can be written.

    Raises: ValueError for another suffix; OSError.
    """
    if out.suffix not in suffixes:
        raise ValueError(f"{name}{out} must end in {' or '.join(suffixes)}.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
            raise OSError("no permission, or a directory")
    except OSError as error:
        raise OSError(f"cannot write {name}{out}: {error}") from error


def run(main: Callable, on_cpu: bool = False) -> None:
    """Parses the flags, connects the processes, starts the log, and calls main.

    Args: on_cpu, leaves the accelerators to the processes that main starts.

    An error that this package, configs or experiments raise is a message to the user and ends the
    command as such; any other keeps its traceback.
    """
    flags.DEFINE_bool(
        "distributed", False, "Connect several processes: TPU pod, SLURM, Open MPI, GKE are found."
    )
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, where none is found.")
    flags.DEFINE_integer("num_processes", None, "With --coordinator_address.")
    flags.DEFINE_integer("process_id", None, "With --coordinator_address.")
    flags.DEFINE_bool("traceback", False, "Show where an error was raised.")
    # --help shows the flags of the command's own module only, unless told that these are its too.
    for flag in FLAGS.flags_by_module_dict()[__name__]:
        FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    app.run(lambda argv: _start(main, argv, on_cpu), flags_parser=_parse)


def _parse(argv):
    """The positional arguments; what is wrong with the others ends the command in a line or two."""
    try:
        rest = FLAGS(argv)
        if "config" in FLAGS and FLAGS.config is not None:
            _ = FLAGS.config.to_dict  # raises what kept the file from loading
        return rest
    except flags.Error as error:
        # An error inside get_config comes as the text of a traceback.
        reason = str(error).strip().rpartition("Error: ")[2]
        sys.exit(f"error: {reason}\n--help lists the flags.")
    except OSError as error:
        sys.exit(f"error: cannot load --config: {str(error).splitlines()[-1].strip()}")
    except (AttributeError, KeyError) as error:
        # ml_collections' message names the key and near ones, behind a long traceback.
        message = str(error.args[0]).replace("\\n", "\n").replace("'", "")
        frames = traceback.extract_tb(error.__traceback__)
        if frame := next((f for f in frames if f.name == "get_config"), None):
            first, listing, hint = message.partition(" Other fields present")
            if not listing:
                raise  # a bug of another kind in the user's file
            sys.exit(f"error: {frame.filename}:{frame.lineno}: {first}\n{hint.splitlines()[-1]}")
        sys.exit(f"error: unknown config key {message}\nAll keys are in configs/default.py.")


def _start(main, argv, on_cpu):
    _start_log()
    if FLAGS.distributed or FLAGS.coordinator_address:
        jax.distributed.initialize(FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id)
    compilation_cache.enable()
    if on_cpu:
        jax.config.update("jax_platforms", "cpu")
    else:
        _check_accelerator()
    if jax.process_index():  # the first process speaks for all
        logger.setLevel(logging.WARNING)
        sys.stdout = io.StringIO()
    try:
        main(argv)
    except (ValueError, OSError, FloatingPointError) as error:
        if FLAGS.traceback or not _is_ours(error):
            raise
        sys.exit(f"error: {error}")


def _is_ours(error):
    """Whether this code raised it, with a message for users; not a library that it calls."""
    raised_in = pathlib.Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    root = pathlib.Path(__file__).parents[1]
    return any(root / name in raised_in.parents for name in ("dit_jax", "configs", "experiments"))


def _start_log():
    """Plain lines of this package; of others only warnings."""
    absl.logging.set_verbosity(absl.logging.WARNING)
    # Orbax reports a full disk once per file, with a traceback each; our error sums it up.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    absl.logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
    sys.unraisablehook = _report_unraisable
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)


def _report_unraisable(unraisable):
    """Without tensorstore's threads that end after Orbax has given up on a write."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _check_accelerator():
    """Ends the command if JAX has no wheel for the platform asked for; warns if a GPU lies idle."""
    wheels = "make install ACCELERATOR=cuda13 (or cuda12, tpu)"
    try:
        backend = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # the latter, empty, where the wheel is absent
        platforms = jax.config.jax_platforms
        sys.exit(
            f"error: JAX cannot start JAX_PLATFORMS={platforms!r}: {str(error) or 'no wheel'}\n"
            f"Install JAX with the wheel of your accelerator: {wheels}"
        )
    if backend == "cpu" and pathlib.Path("/dev/nvidia0").exists():
        logger.warning("An NVIDIA GPU is here, but this JAX runs on the CPU: %s", wheels)
