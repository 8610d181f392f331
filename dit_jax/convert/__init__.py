"""Conversion between published checkpoints and this project's parameters, one module per format.

Each module holds a table of names and layouts. A file must have every array of the table, and no
other.
"""

from dit_jax.convert.conversions import load, to_workdir

__all__ = ["load", "to_workdir"]
