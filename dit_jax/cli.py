"""What the commands share: their flags, errors, log lines and signals, several processes.

Exit statuses: 0, the work is done; 1, an error, with a message; 130 and 143, stopped by Ctrl-C or
SIGTERM.
"""

import contextlib
import errno
import io
import logging
import os
import pathlib
import re
import sys
import threading
import warnings
from collections.abc import Callable

import absl.logging
import jax
from absl import app, flags

from dit_jax.config import arguments, ranges
from dit_jax.errors import UserError, UserFileError
from dit_jax.system import compilation_cache, files, stopping, terminal

logger = logging.getLogger("dit_jax")

FLAGS = flags.FLAGS
# Of a disk or a machine, not of the command: once they are mended the same command goes on.
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.ESTALE, errno.ENFILE)
# Of JAX, which seeds and checkpoints depend on.
SETTINGS = {
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_enable_x64": False,
}
FOR_THE_USER = (UserError, UserFileError, FloatingPointError)
OF_PROJECT = ("configs", "experiments")  # packages beside this one, which installing it adds
TOGETHER = 10.0  # seconds that a process which failed waits for the others to end with it
SMALLER = (
    "Take a smaller batch or model, config.model.remat, config.grad_accumulation_steps, or more "
    "devices."
)
TRACEBACK = "--traceback shows where this one stood."
LONGEST = 300  # characters of a name in a message


def define_config(required: bool = True, key: str = "model") -> None:
    """--config FILE[:ARG] and --config.key=value, locked.

    Args: key, that a config of this kind has: 'model' a run's, 'grids' a sweep's.
    """
    flags.DEFINE_flag(arguments.ConfigFlag(key))
    if required:
        flags.mark_flag_as_required("config")


def define_path(name: str, default: str | None, text: str, required: bool = False) -> None:
    """A flag whose value is a pathlib.Path."""
    flags.DEFINE(arguments.PathParser(name), name, default, text, required=required)


def define_images(name: str, text: str) -> None:
    """A flag for images that exist: the text of a path, `~` expanded, or NAME:SPLIT."""
    flags.DEFINE(arguments.PathParser(name, text=True), name, None, text)


def define_size(name: str, default: str | None, text: str) -> None:
    """A flag whose value is a size: a number, or (height, width)."""
    flags.DEFINE(arguments.SizeParser(), name, default, text)


def define_numbers(name: str, default: str, text: str, kind: type) -> None:
    """A flag whose value is a tuple of numbers, of the type `kind`."""
    flags.DEFINE(arguments.NumbersParser(kind), name, default, text)


def define_paths(name: str, text: str) -> None:
    """A required flag that may be repeated, whose value is a list of pathlib.Path."""
    flags.DEFINE_multi(arguments.PathParser(name), None, name, None, text, required=True)


def define_seed(text: str) -> None:
    """--seed, 0 by default."""
    flags.DEFINE_integer("seed", 0, text, lower_bound=0, upper_bound=ranges.SEEDS)


def check_out(out: pathlib.Path, suffixes: tuple[str, ...], name: str = "--out=") -> None:
    """Demands now, rather than after the work, that --out can be written, and is no input.

    Raises: ValueError for another suffix, or for the file that another flag names; OSError, also
      for a name too long for the temporary file of `files.replace`.
    """
    if out.suffix not in suffixes:
        raise UserError(f"{name}{out} must end in {' or '.join(suffixes)}.")
    for flag, value in FLAGS.flag_values_dict().items():
        if flag == name.strip("-=") or not isinstance(FLAGS[flag].parser, arguments.PathParser):
            continue
        for path in value if isinstance(value, list) else [value]:
            if path and out.exists() and os.path.exists(path) and os.path.samefile(out, path):
                raise UserError(
                    f"{name}{out} is the file of --{flag}, which would be lost: choose another."
                )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
            raise UserFileError("no permission, or a directory")
        with contextlib.suppress(FileNotFoundError):
            os.lstat(files.temporary(out))
    except OSError as error:
        reason = error
        if error.errno == errno.ENAMETOOLONG:
            reason = "the name is too long, with the .tmp that it ends in until it is whole"
        raise UserFileError(f"cannot write {name}{_shorten(out)}: {reason}") from error


def run(
    main: Callable[[list[str]], object],
    positionals: str = "",
    kept: Callable[[], str] = lambda: "nothing is kept",
    stopped_status: int | None = None,
    saves: bool = False,
    on_cpu: bool = False,
) -> None:
    """Parses the flags, connects the processes, starts the log, calls main, ends the process.

    Args:
      main: takes the words without a flag.
      positionals: the names of these, such as 'KIND SRC DST'; 'MODEL ...' is any number.
      kept: what is there to go on from when a signal or a full disk has ended the command.
      stopped_status: the exit status after a signal or a full disk, instead of 130, 143 or 1.
      saves: main trains; several processes agree on the step where SIGTERM ends it.
      on_cpu: leaves the accelerators to the processes that main starts.

    An error of `dit_jax.errors` ends the command with its message, and so does one of the operating
    system that names a file. Any other keeps its traceback.
    """
    terminal.open_streams()
    flags.DEFINE_bool("traceback", False, "Show where an error was raised.")
    if not on_cpu:
        _define_processes()
    # --help shows the flags of the command's own module only, unless told that these are its too.
    for module, defined in FLAGS.flags_by_module_dict().items():
        for flag in defined if module.startswith("dit_jax.") else ():
            FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    sys.unraisablehook = _report_unraisable
    with stopping.Raising() as signals:

        def start(words):
            _start_log()
            _start_jax(on_cpu)
            if not saves:  # of several processes JAX has set its own handler of SIGTERM
                signals.install()
            try:
                main(words)
            except Exception as error:
                stopping.raise_wrapped(error)
                raise
            sys.stdout.flush()
            if not jax.distributed.is_initialized():  # the others may let this one wait
                signals.finish()

        try:
            app.run(
                lambda words: _explain_errors(start, words, kept, stopped_status or 1),
                flags_parser=lambda argv: _parse(argv, positionals),
            )
        except stopping.Stopped as stopped:
            signals.ignore()
            _end(stopped, kept, stopped_status or stopped.status)
        except BaseException as error:
            signals.ignore()  # another would end what follows with a traceback
            if jax.distributed.is_initialized() and not _is_success(error):
                _leave(error)
            raise


def _is_success(error):
    return isinstance(error, SystemExit) and not error.code


def _leave(error):
    """Ends a process of several that failed, though the others may wait for it in vain.

    They end by its end. JAX would first wait five minutes for them.
    """
    if not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
    sys.stdout.flush()
    sys.stderr.flush()
    leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    leaving.start()
    leaving.join(TOGETHER)  # all of them may have failed alike
    if leaving.is_alive():
        stopping.end(1)
    sys.exit(1)


def _define_processes():
    flags.DEFINE_bool(
        "distributed", False, "Connect several processes: TPU pod, SLURM, Open MPI, GKE are found."
    )
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "HOST:PORT of process 0, where none is found. It listens without a password, on all "
        "interfaces: keep the port on a private network, see docs/several_processes.md.",
    )
    flags.DEFINE_string(
        "coordinator_bind_address", None, "HOST:PORT where process 0 listens, instead of all."
    )
    flags.DEFINE_integer("num_processes", None, "With --coordinator_address.", 1, ranges.MOST)
    flags.DEFINE_integer("process_id", None, "With --coordinator_address.", 0, ranges.MOST)


def _parse(argv, positionals):
    """The words without a flag; what is wrong with the others ends the command in a line or two."""
    try:
        return arguments.parse(argv, positionals)
    except SystemExit:  # after --help, where absl would report a failure
        sys.exit(0)
    except (ValueError, OSError, flags.Error) as error:
        if "--traceback" in argv:
            raise
        _fail(_message(error))


def _explain_errors(start, words, kept, passing_status=1):
    try:
        start(words)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        exhausted = stopping.is_out_of_memory(error)
        if FLAGS.traceback or not (exhausted or jax.distributed.is_initialized()):
            raise
        first = (str(error).splitlines() or [""])[0]
        if exhausted:
            _fail(f"out of memory: {first}\n{SMALLER} {TRACEBACK}")
        message = f"{first}\nAnother process may have ended first: see its output. {TRACEBACK}"
        _fail(message + _way_on(kept()))
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        if FLAGS.traceback or not _is_for_the_user(error):
            raise
        message = _message(error)
        if getattr(error, "filename", None) == "<stdout>":
            text = "what the command has written to files is kept"
        else:
            text = kept() if is_passing(error) else getattr(error, "kept", str)()
        if text or _is_lost(error):
            message += _way_on(text)
        _fail(message, passing_status if is_passing(error) else 1)


def _way_on(kept):
    """What is kept, where something is known of it, and the command that goes on."""
    sentence = f"\n{kept[0].upper()}{kept[1:]}." if kept else ""
    return f"{sentence} To go on, run: {_command()}"


def _fail(message, status=1):
    """Ends the command with a message."""
    sys.stderr.write(terminal.escape(f"error: {message}\n"))
    sys.exit(status)


def _end(stopped, kept, status):
    """Ends the command after a signal: says what is kept, and the command that goes on."""
    speaks = logger.level <= logging.INFO  # the first process, for all that have saved
    if speaks or not stopped.kept:
        kept = stopped.kept or (kept() if FLAGS.is_parsed() else "nothing is kept")
        name = stopping.NAMES[stopped.number]
        sys.stderr.write(terminal.escape(f"{name}: {kept}.\nTo go on, run: {_command()}\n"))
    sys.stdout.flush()
    if stopped.kept:
        sys.exit(status)
    stopping.end(status)  # the signal came anywhere: threads and workers are still busy


def _command():
    return terminal.command_line(sys.orig_argv)


def _message(error):
    """An error's text; of the operating system's ones without their number."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error}: install the project again, pip install -e DIRECTORY of pyproject.toml."
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    names = [_shorten(name) for name in (error.filename, error.filename2) if name is not None]
    if "temporary directory" in error.strerror:  # Python's tempfile
        return f"{error.strerror}: make room in one of them, or set TMPDIR to another directory."
    return f"{' to '.join(names)}: {error.strerror}" if names else error.strerror


def _shorten(name):
    text = files.printable(os.fsdecode(name) if isinstance(name, bytes) else str(name))
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}...{text[-LONGEST // 2 :]}"


def _is_of_a_file(error):
    """Whether the operating system refused a file, or has no room for it."""
    known = isinstance(error, OSError) and error.errno is not None
    named = isinstance(error, FileNotFoundError) or getattr(error, "filename", None) is not None
    return known and (named or error.errno in PASSING)


def is_passing(error: BaseException) -> bool:
    """Whether an error is of a full disk or the like: once that is mended, the command goes on."""
    text = str(error)  # libraries wrap the operating system's errors
    return any(os.strerror(number) in text for number in PASSING)


def _is_lost(error):
    """Whether it, or what it was raised from, is a directory or a lock that went away."""
    while error and not isinstance(error, files.LostError):
        error = error.__cause__
    return error is not None


def _is_for_the_user(error):
    """Whether its message says all that there is to do; a bug of ours or of a library does not."""
    if isinstance(error, ModuleNotFoundError):
        return error.name in OF_PROJECT
    return isinstance(error, FOR_THE_USER) or _is_of_a_file(error)


def _start_log():
    """Plain lines of this package; of others only warnings."""
    absl.logging.set_verbosity(absl.logging.WARNING)
    # Orbax reports a full disk once per file, with a traceback each; our error sums it up.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    absl.logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
    absl.logging.get_absl_handler().setFormatter(terminal.Formatter("%(message)s"))
    # After an array that cannot be read, those behind it are left unread, and Python warns of it.
    warnings.filterwarnings("ignore", r"coroutine .* was never awaited", RuntimeWarning)
    # Python removes what Grain's workers share with a process that is killed, but warns of it.
    sys.warnoptions.append("ignore:resource_tracker")
    handler = logging.StreamHandler()
    handler.setFormatter(terminal.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)


def _report_unraisable(unraisable):
    """Without what is left of Orbax's work after its error, which the command has reported.

    These are tensorstore's threads that end after a write, and the other arrays of a read.
    """
    code = getattr(unraisable.object, "cr_code", None)  # of a coroutine
    of_orbax = code is not None and "orbax" in pathlib.Path(code.co_filename).parts
    if not of_orbax and str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _fix_settings():
    """Sets aside what a user's environment says of JAX that would change every random number."""
    for name, value in SETTINGS.items():
        if (found := getattr(jax.config, name)) != value:
            logger.warning("%s=%s is not used: results would be others.", name.upper(), found)
            jax.config.update(name, value)


def _start_jax(on_cpu):
    """Connects the processes, if there are several, and finds the devices."""
    _fix_settings()
    if on_cpu:
        jax.config.update("jax_platforms", "cpu")
        return
    names = ("coordinator_bind_address", "num_processes", "process_id")
    if FLAGS.distributed or FLAGS.coordinator_address:
        _connect()
    elif given := [f"--{name}" for name in names if FLAGS[name].value is not None]:
        raise UserError(f"{', '.join(given)}: say --coordinator_address or --distributed too.")
    compilation_cache.enable()
    _check_accelerator()
    if jax.process_index():  # the first process speaks for all
        logger.setLevel(logging.WARNING)
        sys.stdout = io.StringIO()


def _connect():
    """Connects this process with the others.

    Raises: ValueError for flags that do not fit together, or if the others cannot be reached.
    """
    address, bind = FLAGS.coordinator_address, FLAGS.coordinator_bind_address
    num, process = FLAGS.num_processes, FLAGS.process_id
    for name, text in (("coordinator_address", address), ("coordinator_bind_address", bind)):
        if text is not None and not re.fullmatch(r".+:\d+", text):
            raise UserError(f"--{name}={text} must be HOST:PORT.")
    if address and (num is None) != (process is None):
        raise UserError("--coordinator_address needs both --num_processes and --process_id.")
    if None not in (num, process) and process >= num:
        raise UserError(f"--process_id={process} must be below --num_processes={num}.")
    try:
        jax.distributed.initialize(address, num, process, coordinator_bind_address=bind)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot connect the processes: {str(error).splitlines()[0]}\nWhere no cluster is "
            "found, give --coordinator_address, --num_processes and --process_id."
        ) from error


def _check_accelerator():
    """Ends the command if JAX has no wheel for the platform asked for; warns if a GPU lies idle."""
    wheels = "make install ACCELERATOR=cuda13 (or cuda12, tpu)"
    try:
        backend = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # the latter, empty, where the wheel is absent
        platforms = jax.config.jax_platforms
        _fail(
            f"JAX cannot start JAX_PLATFORMS={platforms!r}: {str(error) or 'no wheel'}\n"
            f"Install JAX with the wheel of your accelerator: {wheels}"
        )
    if backend == "cpu" and pathlib.Path("/dev/nvidia0").exists():
        logger.warning("An NVIDIA GPU is here, but this JAX runs on the CPU: %s", wheels)
