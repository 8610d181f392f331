"""Runs commands in forks of one process that has imported everything: most of a command's time.

  python tests/zygote.py    reads a JSON request per line, and answers with a line

A request is {"argv": [module, ...], "env": {}, "out": PATH}; the answer {"status", "max_rss"}, the
largest memory in bytes. Standard output and error of the command are written to PATH.out and .err.
Until a command runs, no JAX backend is started here: threads do not survive a fork.
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

IMPORTED = ("train", "evaluate", "encode", "edit", "convert", "plot", "reconstruct", "flops")
SECONDS = 300  # that a command may take


def _run(request):
    """The command of a request, in this process."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(request["out"] + suffix, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
    os.environ.update(request["env"])
    module, *arguments = request["argv"]
    warnings.filterwarnings("ignore", message=".*found in sys.modules after import of package")
    sys.argv = [module, *arguments]
    sys.orig_argv = [sys.executable, "-m", module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _fork(request):
    pid = os.fork()
    if pid:
        _, status, usage = os.wait4(pid, 0)
        return {"status": os.waitstatus_to_exitcode(status), "max_rss": usage.ru_maxrss * 1024}
    status = 1
    signal.alarm(SECONDS)
    try:
        _run(request)
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


def main():
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    for module in IMPORTED:
        importlib.import_module(f"dit_jax.{module}")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(_fork(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
