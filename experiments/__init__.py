"""Experiments, one folder per question, and `scaling`, the tool that scaling studies share."""

import dit_jax  # noqa: F401  it sets what Ctrl-C does while a command imports
