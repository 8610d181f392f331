"""Conversion between published checkpoints and this project's parameters, one module per format.

Each has the same parts in the same order: `to_params`, `make_table` with the names and layouts of
the published arrays, then what reads the model's sizes and its files. A file must have every array
of the table, and no other.
"""

from dit_jax.convert.conversions import load, to_workdir

__all__ = ["load", "to_workdir"]
