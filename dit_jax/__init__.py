"""Diffusion transformers in JAX: train, sample, evaluate and study how they scale."""

import signal
import sys

# `python -m dit_jax.<command>` imports modules for seconds. Meanwhile Ctrl-C ends the process
# without a traceback, because no work is lost. Later `cli.run` handles signals.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
