"""Imports torch-fidelity without torchvision, which needs another torch and serves its datasets."""

import importlib
import sys
import types

ABSENT = ("torchvision", "torchvision.datasets", "torchvision.transforms")
FUNCTIONAL = "torchvision.transforms.functional"


class _Absent(types.ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def import_module(name):
    """Imports torch_fidelity.<name> with stand-ins for torchvision's modules."""
    modules = {module: _Absent(module) for module in (*ABSENT, FUNCTIONAL)}
    for module, stand_in in modules.items():
        parent, _, child = module.rpartition(".")
        if parent:
            setattr(modules[parent], child, stand_in)
    originals = {module: sys.modules.get(module) for module in modules}
    sys.modules.update(modules)
    try:
        return importlib.import_module(f"torch_fidelity.{name}")
    finally:
        # Other libraries look for torchvision, and would mistake the stand-ins for it.
        for module, original in originals.items():
            if original is None:
                del sys.modules[module]
            else:
                sys.modules[module] = original
