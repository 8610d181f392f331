"""Code that all commands share: flags, error messages, the log, signals, several processes.

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

from dit_jax.config import arguments, parsers, ranges
from dit_jax.errors import UserError, UserFileError
from dit_jax.system import compilation_cache, files, stopping, terminal

logger = logging.getLogger("dit_jax")

FLAGS = flags.FLAGS
# Faults of a disk or a machine, not of the command. When the user has repaired the fault, the same
# command continues the work.
REPAIRABLE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.ESTALE, errno.ENFILE)
# JAX settings that random numbers and checkpoints depend on.
FIXED_SETTINGS = {
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_enable_x64": False,
}
USER_ERRORS = (UserError, UserFileError, FloatingPointError)
PROJECT_PACKAGES = ("configs", "experiments")  # the other packages that installing dit_jax adds
SHUTDOWN_SECONDS = 10.0  # for which a failed process waits until all processes shut down
OUT_OF_MEMORY_ADVICE = (
    "Take a smaller batch or model, or more devices, or set config.model.remat or "
    "config.grad_accumulation_steps."
)
TRACEBACK_HINT = "--traceback shows where this process was."
MAX_NAME_LENGTH = 300  # characters of a file name in a message


def define_config(required: bool = True, key: str = "model") -> None:
    """Defines --config FILE[:ARG] and --config.key=value; the config is locked.

    Args: key, a top-level key that the config must have: 'model' for a run, 'grids' for a sweep.
    """
    flags.DEFINE_flag(arguments.ConfigFlag(key))
    if required:
        flags.mark_flag_as_required("config")


def define_path(name: str, default: str | None, help_text: str, required: bool = False) -> None:
    """Defines a flag whose value is a pathlib.Path."""
    flags.DEFINE(parsers.PathParser(name), name, default, help_text, required=required)


def define_images(name: str, help_text: str) -> None:
    """Defines a flag for existing images, a string: a path with `~` expanded, or NAME:SPLIT."""
    flags.DEFINE(parsers.PathParser(name, as_string=True), name, None, help_text)


def define_paths(name: str, help_text: str) -> None:
    """Defines a required flag that may be repeated; its value is a list of pathlib.Path."""
    flags.DEFINE_multi(parsers.PathParser(name), None, name, None, help_text, required=True)


def define_seed(help_text: str) -> None:
    """Defines --seed, 0 by default."""
    flags.DEFINE_integer("seed", 0, help_text, lower_bound=0, upper_bound=ranges.MAX_SEED)


def check_out(out: pathlib.Path, suffixes: tuple[str, ...], prefix: str = "--out=") -> None:
    """Checks, before the work, that an output file can be written; creates its directory.

    Args: prefix, the flag or word of the command line that names the file, with '='.
    Raises: ValueError for another suffix, or if another flag names the same file; OSError if the
      file cannot be written.
    """
    if out.suffix not in suffixes:
        raise UserError(f"{prefix}{out} must end in {' or '.join(suffixes)}.")
    for flag, value in FLAGS.flag_values_dict().items():
        if flag == prefix.strip("-=") or not isinstance(FLAGS[flag].parser, parsers.PathParser):
            continue
        for path in value if isinstance(value, list) else [value]:
            if path and out.exists() and os.path.exists(path) and os.path.samefile(out, path):
                raise UserError(
                    f"{prefix}{out} would overwrite the file of --{flag}: choose another file."
                )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
            raise UserFileError("no permission, or a directory")
        # A longer name than the system allows raises here, even if there is no such file. The
        # temporary file of `files.replace` has the longest name.
        with contextlib.suppress(FileNotFoundError):
            os.lstat(files.temporary(out))
    except OSError as error:
        reason = error
        if error.errno == errno.ENAMETOOLONG:
            reason = "the name is too long: .tmp is added to it until the file is complete"
        raise UserFileError(f"cannot write {prefix}{_shorten(out)}: {reason}") from error


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
      main: called with the positional words, which are not flags.
      positionals: names of these words, such as 'KIND SRC DST'; 'MODEL ...' allows any number.
      kept: returns a text that says what is saved after a signal or a full disk.
      stopped_status: the exit status after a signal or a full disk, instead of 130, 143 or 1.
      saves: whether main itself saves at SIGTERM, after several processes agree on the step.
      on_cpu: whether main runs on the CPU and leaves the accelerators to its child processes.

    An error of `dit_jax.errors`, or an operating system error that names a file, ends the command
    with its message. Any other error keeps its traceback.
    """
    terminal.open_streams()
    _define_common_flags(on_cpu)
    sys.unraisablehook = _report_unraisable
    with stopping.Raising() as signals:

        def start(words):
            _start_log()
            _start_jax(on_cpu)
            # When JAX connects several processes, it sets its own handler of SIGTERM. In training
            # this handler makes the processes agree on a step; other commands replace it.
            if not saves:
                signals.install()
            try:
                main(words)
            except Exception as error:
                stopping.raise_wrapped(error)
                raise
            sys.stdout.flush()
            # The exit of several processes may wait for all of them; Ctrl-C must work meanwhile.
            if not jax.distributed.is_initialized():
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
            signals.ignore()  # a second signal would interrupt the lines below with a traceback
            succeeded = isinstance(error, SystemExit) and not error.code
            if jax.distributed.is_initialized() and not succeeded:
                _shut_down_processes(error)
            raise


def _shut_down_processes(error):
    """Ends this process, one of several, after an error, so that the other processes end too.

    The other processes may wait for this one, and at exit JAX would wait five minutes for them.
    """
    if not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
    sys.stdout.flush()
    sys.stderr.flush()
    thread = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    thread.start()
    # If all processes fail with the same error, they shut down together and in order.
    thread.join(SHUTDOWN_SECONDS)
    if thread.is_alive():
        stopping.end(1)
    sys.exit(1)


def _define_common_flags(on_cpu):
    """Defines --traceback and the flags that connect processes; lists all flags in --help."""
    flags.DEFINE_bool("traceback", False, "Show where an error was raised.")
    if not on_cpu:
        text = "Connect the processes of a TPU pod, SLURM, Open MPI or GKE."
        flags.DEFINE_bool("distributed", False, text)
        text = (
            "HOST:PORT of process 0, for other clusters. Process 0 listens without a password, on "
            "all interfaces: keep the port on a private network, see docs/several_processes.md."
        )
        flags.DEFINE_string("coordinator_address", None, text)
        text = "HOST:PORT where process 0 listens, instead of all interfaces."
        flags.DEFINE_string("coordinator_bind_address", None, text)
        text = "With --coordinator_address: the number of processes."
        flags.DEFINE_integer("num_processes", None, text, 1, ranges.MAX_COUNT)
        text = "With --coordinator_address: this process, counted from 0."
        flags.DEFINE_integer("process_id", None, text, 0, ranges.MAX_COUNT)
    # absl's --help shows only the flags of the command's own module. So all flags of dit_jax are
    # registered with this module too.
    for module, module_flags in FLAGS.flags_by_module_dict().items():
        for flag in module_flags if module.startswith("dit_jax.") else ():
            FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def _parse(argv, positionals):
    """Returns the positional words; a wrong word ends the command with a message."""
    try:
        return arguments.parse(argv, positionals)
    except SystemExit:  # after --help; absl would exit with status 1
        sys.exit(0)
    except (ValueError, OSError, flags.Error) as error:
        if "--traceback" in argv:
            raise
        _fail(_format_error(error))


def _explain_errors(start, words, kept, repairable_status=1):
    """Calls start(words); after an error for the user, ends the command with the message.

    Args: kept, as in `run`.   repairable_status, the exit status if the error `is_repairable`.
    """
    try:
        start(words)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        is_out_of_memory = stopping.is_out_of_memory(error)
        if FLAGS.traceback or not (is_out_of_memory or jax.distributed.is_initialized()):
            raise
        first_line = str(error).partition("\n")[0]  # XLA's messages may have many lines
        if is_out_of_memory:
            _fail(f"out of memory: {first_line}\n{OUT_OF_MEMORY_ADVICE} {TRACEBACK_HINT}")
        hint = f"Another process may have ended first: see its output. {TRACEBACK_HINT}"
        _fail(f"{first_line}\n{hint}{_make_resume_hint(kept())}")
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        if FLAGS.traceback or not _is_user_error(error):
            raise
        repairable = is_repairable(error)
        # `terminal.Stream` gives its errors this name. Only printed text is lost.
        if getattr(error, "filename", None) == "<stdout>":
            kept_text = "what the command has written to files is kept"
        elif repairable:
            kept_text = kept()
        else:
            # `stopping.attach_kept_message` sets this attribute.
            kept_text = error.kept() if hasattr(error, "kept") else ""
        hint = _make_resume_hint(kept_text) if kept_text or _has_lost_directory(error) else ""
        _fail(_format_error(error) + hint, repairable_status if repairable else 1)


def _make_resume_hint(kept_text):
    """Returns sentences that say what is kept, if anything, and which command continues."""
    sentence = f"\n{kept_text[0].upper()}{kept_text[1:]}." if kept_text else ""
    return f"{sentence} To go on, run: {terminal.format_command(sys.orig_argv)}"


def _fail(message, status=1):
    """Prints an error message and ends the command."""
    sys.stderr.write(terminal.escape(f"error: {message}\n"))
    sys.exit(status)


def _end(stopped, kept, status):
    """Prints what is kept and which command continues; ends the command after a signal."""
    is_first_process = logger.level <= logging.INFO  # `_start_jax` raises this level in the others
    # If the processes have saved, only the first one reports it.
    if is_first_process or not stopped.kept:
        kept = stopped.kept or (kept() if FLAGS.is_parsed() else "nothing is kept")
        line = f"{stopping.NAMES[stopped.number]}: {kept}."
        command = terminal.format_command(sys.orig_argv)
        sys.stderr.write(terminal.escape(f"{line}\nTo go on, run: {command}\n"))
    sys.stdout.flush()
    if stopped.kept:
        sys.exit(status)
    # The signal may have interrupted anything, so threads and workers are still busy.
    stopping.end(status)


def _format_error(error):
    """Returns the message of an error, without the number of an operating system error."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error}. Install the project again: pip install -e DIRECTORY of pyproject.toml."
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    names = [_shorten(name) for name in (error.filename, error.filename2) if name is not None]
    if "temporary directory" in error.strerror:  # Python's tempfile
        return f"{error.strerror}: make room in one of them, or set TMPDIR to another directory."
    return f"{' to '.join(names)}: {error.strerror}" if names else error.strerror


def _shorten(name):
    """Returns a printable file name for a message; leaves out the middle of a long name."""
    text = files.printable(os.fsdecode(name) if isinstance(name, bytes) else str(name))
    half = MAX_NAME_LENGTH // 2
    return text if len(text) <= MAX_NAME_LENGTH else f"{text[:half]}...{text[-half:]}"


def is_repairable(error: BaseException) -> bool:
    """Returns whether a full disk or another fault in REPAIRABLE_ERRNOS caused an error."""
    # Libraries raise their own errors, which repeat only the text of the operating system's error.
    text = str(error)
    return any(os.strerror(number) in text for number in REPAIRABLE_ERRNOS)


def _has_lost_directory(error):
    """Returns whether an error, or one of its causes, is a `files.LostError`."""
    while error and not isinstance(error, files.LostError):
        error = error.__cause__
    return error is not None


def _is_user_error(error):
    """Returns whether an error is for the user, and not a bug that needs its traceback."""
    if isinstance(error, ModuleNotFoundError):
        return error.name in PROJECT_PACKAGES
    if isinstance(error, USER_ERRORS):
        return True
    # The operating system's errors have a number. They must name a file, or be repairable.
    if not isinstance(error, OSError) or error.errno is None:
        return False
    has_name = isinstance(error, FileNotFoundError) or error.filename is not None
    return has_name or error.errno in REPAIRABLE_ERRNOS


def _start_log():
    """Sets up the log: messages of this package, and only warnings of libraries."""
    absl.logging.set_verbosity(absl.logging.WARNING)
    # Orbax reports a full disk for every file, each with a traceback. The error that the command
    # raises replaces these reports.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    absl.logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
    absl.logging.get_absl_handler().setFormatter(terminal.Formatter("%(message)s"))
    # When an array cannot be read, the reads of later arrays are abandoned. Python warns about
    # each of these reads.
    warnings.filterwarnings("ignore", r"coroutine .* was never awaited", RuntimeWarning)
    # When a process is killed, Python warns while it frees the memory shared with Grain's workers.
    sys.warnoptions.append("ignore:resource_tracker")
    handler = logging.StreamHandler()
    handler.setFormatter(terminal.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)


def _report_unraisable(unraisable):
    """Reports an exception that Python cannot raise, unless an error of Orbax causes it.

    The command has already reported the error of Orbax. Further exceptions come from threads of
    tensorstore that end after a write, and from the other arrays of a read.
    """
    code = getattr(unraisable.object, "cr_code", None)  # the code of a coroutine
    is_orbax = code is not None and "orbax" in pathlib.Path(code.co_filename).parts
    if not is_orbax and str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _fix_settings():
    """Undoes JAX settings in the user's environment that would change every random number."""
    for name, value in FIXED_SETTINGS.items():
        if (current := getattr(jax.config, name)) != value:
            logger.warning("%s=%s is not used: results would differ.", name.upper(), current)
            jax.config.update(name, value)


def _start_jax(on_cpu):
    """Connects the processes, if there are several, and starts JAX on the devices."""
    _fix_settings()
    if on_cpu:
        jax.config.update("jax_platforms", "cpu")
        return
    names = ("coordinator_bind_address", "num_processes", "process_id")
    if FLAGS.distributed or FLAGS.coordinator_address:
        _connect()
    elif extra := [f"--{name}" for name in names if FLAGS[name].value is not None]:
        raise UserError(f"{', '.join(extra)}: give --coordinator_address or --distributed too.")
    compilation_cache.enable()
    _check_accelerator()
    if jax.process_index():  # only the first process prints, or lines would be repeated
        logger.setLevel(logging.WARNING)
        sys.stdout = io.StringIO()


def _connect():
    """Connects this process with the others, after a check that the flags fit together."""
    for name in ("coordinator_address", "coordinator_bind_address"):
        text = FLAGS[name].value
        if text is not None and not re.fullmatch(r".+:\d+", text):
            raise UserError(f"--{name}={text} must be HOST:PORT.")
    address, bind_address = FLAGS.coordinator_address, FLAGS.coordinator_bind_address
    num_processes, process_id = FLAGS.num_processes, FLAGS.process_id
    if address and (num_processes is None) != (process_id is None):
        raise UserError("--coordinator_address needs both --num_processes and --process_id.")
    if None not in (num_processes, process_id) and process_id >= num_processes:
        raise UserError(f"--process_id={process_id} must be below --num_processes={num_processes}.")
    try:
        jax.distributed.initialize(
            address, num_processes, process_id, coordinator_bind_address=bind_address
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot connect the processes: {str(error).splitlines()[0]}\nIf JAX finds no "
            "cluster, give --coordinator_address, --num_processes and --process_id."
        ) from error


def _check_accelerator():
    """Ends the command if JAX cannot start the requested platform; warns if a GPU is unused."""
    install_command = "make install ACCELERATOR=cuda13 (or cuda12, tpu)"
    try:
        backend = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # without a wheel: an empty AssertionError
        platforms = jax.config.jax_platforms
        _fail(
            f"JAX cannot start JAX_PLATFORMS={platforms!r}: {str(error) or 'no wheel'}\n"
            f"Install JAX with the wheel for your accelerator: {install_command}"
        )
    if backend == "cpu" and pathlib.Path("/dev/nvidia0").exists():
        logger.warning("JAX uses the CPU, but this machine has an NVIDIA GPU: %s", install_command)
