"""torch-fidelity, whose torchvision is for its datasets alone and wants a torch of its own."""

import importlib
import sys
import types

ABSENT = ("torchvision", "torchvision.datasets", "torchvision.transforms")
FUNCTIONAL = "torchvision.transforms.functional"


class _Absent(types.ModuleType):
    """A module of which every name is a class that does nothing."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def import_module(name):
    """torch_fidelity.<name>, in the absence of torchvision."""
    modules = {module: _Absent(module) for module in (*ABSENT, FUNCTIONAL)}
    for module, stand_in in modules.items():
        parent, _, child = module.rpartition(".")
        if parent:
            setattr(modules[parent], child, stand_in)
    before = {module: sys.modules.get(module) for module in modules}
    sys.modules.update(modules)
    try:
        return importlib.import_module(f"torch_fidelity.{name}")
    finally:
        # Other libraries ask whether there is a torchvision, and would take these for one.
        for module, was in before.items():
            if was is None:
                del sys.modules[module]
            else:
                sys.modules[module] = was
