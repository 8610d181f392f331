"""Questions, one folder each; `experiments.scaling` is also the tool of scaling studies."""

import dit_jax  # noqa: F401  what Ctrl-C does while a command imports
