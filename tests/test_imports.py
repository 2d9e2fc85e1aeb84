"""Imports: light at the top, one way between the layers, optional packages only where they belong."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gspn2

PACKAGE = Path(gspn2.__file__).parent

# A layer may import from itself, from layers of lower rank, and at rank 5 from its peers.
RANKS = {
    "__main__": 7,
    "cli": 6,
    "training": 5,
    "bench": 5,
    "demo": 5,
    "integrations": 5,
    "models": 4,
    "nn": 3,
    "__init__": 2.5,
    "functional": 2,
    "ops": 1,
    "backends": 0,
}

# Who may import what at all; "lazily" means in a function, or for type checkers.
OWNERS = {
    "timm": {
        "models": "anywhere",
        "training": "lazily",
        "cli": "lazily",
        "demo": "lazily",
        "bench": "lazily",
    },
    "torchvision": {"training": "anywhere", "cli": "lazily", "demo": "lazily", "bench": "lazily"},
    "diffusers": {"integrations": "anywhere"},
    "transformers": {"integrations": "anywhere"},
    "numba": {"backends": "anywhere"},
    "cuda": {"backends": "lazily"},
    # In the files of kernels, which nothing imports before one is wanted.
    "triton": {"backends": "anywhere"},
}

OPTIONAL = (
    *("timm", "torchvision", "numba", "llvmlite", "cuda", "diffusers", "transformers", "safetensors"),
    *("matplotlib", "sklearn", "scipy", "rich", "PIL"),
)

MODULES = sorted(PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    """The layer of a source file: the first part of its path inside the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, bool, int]]:
    """Absolute names a file imports, whether lazily (in a function, or for type checkers), and the line."""
    package = ("gspn2", *path.relative_to(PACKAGE).parts[:-1])

    def walk(node: ast.AST, lazily: bool) -> Iterator[tuple[str, bool, int]]:
        for child in ast.iter_child_nodes(node):
            inside = lazily or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                inside = True
            if isinstance(child, ast.Import):
                yield from ((alias.name, lazily, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else ()
                origin = ".".join([*base, *([child.module] if child.module else [])])
                yield from ((f"{origin}.{alias.name}", lazily, child.lineno) for alias in child.names)
            else:
                yield from walk(child, inside)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), False)


def is_module(name: str) -> bool:
    path = PACKAGE / name
    return path.is_dir() or path.with_suffix(".py").is_file()


def imported_layer(name: str) -> str | None:
    """The layer an absolute name belongs to; what the package itself exports is the functional layer's."""
    parts = name.split(".")
    if parts[0] != "gspn2":
        return None
    return parts[1] if len(parts) > 1 and is_module(parts[1]) else "functional"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    layer = layer_of(path)
    assert layer in RANKS, f"{path.name}: a layer the design does not know"
    for name, _, line in imports(path):
        other = imported_layer(name)
        if other is None or other == layer:
            continue
        assert other in RANKS, f"line {line}: {name} belongs to no layer"
        peers = RANKS[layer] == RANKS[other] == RANKS["training"]
        assert RANKS[other] < RANKS[layer] or peers, f"line {line}: {layer} imports {name}, not below it"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_optional_packages_stay_where_they_belong(path: Path) -> None:
    layer = layer_of(path)
    for name, lazily, line in imports(path):
        owners = OWNERS.get(name.split(".")[0])
        if owners is None:
            continue
        where = owners.get(layer)
        assert where is not None, f"line {line}: {layer} imports {name}; only {', '.join(owners)} may"
        assert lazily or where == "anywhere", f"line {line}: {layer} may import {name} in a function only"


def test_the_walker_sees_every_kind_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two tests above are worth what this finds."""
    file = tmp_path / "nn" / "mixer.py"
    file.parent.mkdir()
    file.write_text(
        "import timm.layers\n"
        "from .. import functional, models\n"
        "from ..models import gspn2_tiny\n"
        "from .block import FFN\n"
        "def build():\n"
        "    if True:\n"
        "        import numba\n"
        "if TYPE_CHECKING:\n"
        "    import diffusers\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    assert list(imports(file)) == [
        ("timm.layers", False, 1),
        ("gspn2.functional", False, 2),
        ("gspn2.models", False, 2),
        ("gspn2.models.gspn2_tiny", False, 3),
        ("gspn2.nn.block.FFN", False, 4),
        ("numba", True, 7),
        ("diffusers", True, 9),
    ]


def loaded_by(statement: str) -> set[str]:
    """Top-level packages loaded after a statement in a fresh interpreter, apart from what torch loads."""
    code = f"import torch, sys; before = set(sys.modules); {statement}; print(*(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return {name.split(".")[0] for name in done.stdout.split()}


def test_importing_loads_nothing_optional() -> None:
    """Not the package, nor what is below the models, nor the command before it knows what to do."""
    light = ("functional", "ops", "backends", "nn", "cli.main")
    loaded = loaded_by(f"import gspn2, {', '.join(f'gspn2.{name}' for name in light)}")
    assert "gspn2" in loaded
    assert not loaded & set(OPTIONAL)


def test_an_integration_needs_the_packages_of_its_extra_only() -> None:
    """Vision encoders of transformers take mixers where neither diffusers nor what the backbones need is."""
    pytest.importorskip("transformers")
    others = ("timm", "torchvision", "diffusers", "accelerate", "PIL", "rich")
    missing = "; ".join(f"sys.modules['{name}'] = None" for name in others)
    assert "transformers" in loaded_by(f"{missing}; import gspn2.integrations.transformers")


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("gspn2.models", "timm", "models"),
        ("gspn2.integrations.diffusers", "diffusers", "diffusers"),
        ("gspn2.integrations.transformers", "transformers", "transformers"),
    ],
)
def test_what_is_not_installed_is_told_with_its_extra(
    module: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package or name.startswith(module)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ModuleNotFoundError, match=rf'{module} needs {package}: .*"gspn2\[{extra}\]"'
    ) as caught:
        importlib.import_module(module)
    assert caught.value.name == package
