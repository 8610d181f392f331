"""Diffusion transformers in JAX: train, sample, evaluate and study how they scale."""

import signal
import sys

# While `python -m dit_jax.<command>` imports, for seconds, nothing is lost: Ctrl-C ends it without
# the tracebacks of whatever was being imported. `cli.run` then receives signals.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
