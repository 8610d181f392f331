"""Published checkpoints to our parameters, and back: one module per format.

Each format is a table of names and layouts; every array of the file must be used, and no other.
"""

from dit_jax.convert.formats import load

__all__ = ["load"]
