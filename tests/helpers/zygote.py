"""Runs commands in forks of a process that has all imports, which take most of a command's time.

  python tests/helpers/zygote.py    reads one JSON request per line, and writes one answer per line

A request is {"argv": [module, ...], "env": {}, "out": PATH}. The command's standard output and
error are written to PATH.out and PATH.err. The answer is {"status", "max_rss"}, with the largest
resident memory in bytes. This process starts no JAX backend, because threads do not survive a fork.
"""

import atexit
import importlib
import json
import os
import pathlib
import resource
import runpy
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence

IMPORTED = ("train", "evaluate", "encode", "edit", "convert", "plot", "reconstruct", "flops")
MAX_SECONDS = 300  # the time limit of a command


def prepare() -> None:
    """Imports the commands of this checkout. Call this once, before `start`."""
    sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
    for module in IMPORTED:
        importlib.import_module(f"dit_jax.{module}")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it


def start(
    argv: Sequence[str],
    env: Mapping[str, str],
    out: pathlib.Path,
    before: Callable[[], object] = lambda: None,
) -> int:
    """Starts a command in a fork that leads a session of its own, and returns its process id.

    Args: argv: [module, ...].   out: standard output and error go to OUT.out and OUT.err.
      before: called in the fork before the command.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    os.setsid()
    signal.alarm(MAX_SECONDS)
    try:
        before()
        _run(argv, env, out)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _run(argv, env, out):
    """Runs the command in this process."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(f"{out}{suffix}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
    os.environ.update(env)
    module, *arguments = argv
    warnings.filterwarnings("ignore", message=".*found in sys.modules after import of package")
    sys.argv = [module, *arguments]
    sys.orig_argv = [sys.executable, "-m", module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def main():
    prepare()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        _, status, usage = os.wait4(start(**json.loads(line)), 0)
        answer = {"status": os.waitstatus_to_exitcode(status), "max_rss": usage.ru_maxrss * 1024}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
