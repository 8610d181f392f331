"""The packages of dit_jax: which may import which, and that the map in CONTRIBUTING.md is whole."""

import ast
import graphlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
HOUSE = ROOT / "dit_jax"

# Each package, and the packages of ours that it imports. A new arrow is a decision: it is added
# here, and must not close a circle.
IMPORTS = {
    "sharding": "",
    "diffusion": "",
    "system": "sharding",
    "config": "system",
    "cli": "config system",
    "data": "config system",
    "models": "config sharding system",
    "datasets": "cli data system",
    "workdirs": "config data models sharding system",
    "conditions": "data models system workdirs",
    "convert": "cli config data diffusion models system workdirs",
    "latents": "conditions config data sharding system workdirs",
    "sampling": "cli conditions config data diffusion latents models sharding system workdirs",
    "evaluation": "conditions config data diffusion latents models sampling sharding system "
    "workdirs",
    "training": "conditions config data diffusion evaluation latents models sampling sharding "
    "system workdirs",
    "commands": "cli conditions config data diffusion evaluation latents models sampling sharding "
    "system training workdirs",
}
MODULES = sorted(HOUSE.rglob("*.py"))


def _package(parts):
    """The package that a path or an import below dit_jax belongs to; the commands are one."""
    name = pathlib.Path(parts[0]).stem
    return name if (HOUSE / name).is_dir() or name in ("cli", "errors") else "commands"


def _imports(path):
    """The modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _arrows():
    """{package: packages of ours that it imports}"""
    arrows = {name: set() for name in [*IMPORTS, "errors"]}
    for path in MODULES:
        here = _package(path.relative_to(HOUSE).parts)
        for name in _imports(path):
            if name.startswith("dit_jax."):
                arrows[here].add(_package(name.split(".")[1:]))
        arrows[here] -= {here, "errors"}  # which all may raise
    return arrows


def test_packages_import_what_the_table_says_and_no_circle_closes():
    allowed = {name: set(others.split()) for name, others in IMPORTS.items()}
    assert _arrows() == allowed | {"errors": set()}
    graphlib.TopologicalSorter(allowed).prepare()  # raises CycleError


def test_diffusion_needs_no_network_library():
    names = {name for path in (HOUSE / "diffusion").glob("*.py") for name in _imports(path)}
    ours = ("dit_jax.diffusion", "dit_jax.errors")
    roots = {name.split(".")[0] for name in names if not name.startswith(ours)}
    assert not roots & {"flax", "optax", "orbax", "dit_jax"}


@pytest.mark.parametrize("package", sorted({path.parent.name for path in MODULES} - {HOUSE.name}))
def test_packages_say_what_they_hold_and_define_nothing(package):
    tree = ast.parse((HOUSE / package / "__init__.py").read_text())
    assert ast.get_docstring(tree)
    for node in tree.body[1:]:
        handed_on = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        assert handed_on or isinstance(node, ast.ImportFrom), ast.unparse(node)


def test_map_names_every_module_and_no_other():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| `?(\w+)/?`? \| [^|]*\|([^|]*)\|$", text, re.MULTILINE)
    named = {name: set(re.findall(r"`(\w+)`", modules)) for name, modules in rows}
    there = {name: set() for name in [*IMPORTS, "errors"]}
    for path in MODULES:
        if not path.name.startswith("__"):
            there[_package(path.relative_to(HOUSE).parts)].add(path.stem)
    there["cli"] = there["errors"] = set()
    assert {name: modules for name, modules in named.items() if name in there} == there
