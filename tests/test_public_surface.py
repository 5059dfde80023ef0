"""What a package's stub promises is there, documented and in order; importing a package costs next to nothing."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from tests.sources import PACKAGES, ROOT

LAZY = "import lazy_loader as lazy\n__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)"


@dataclass(frozen=True)
class Public:
    """One line of a stub: `name` comes from `module`; a submodule has none."""

    module: str | None
    name: str
    shown_as: str | None


def stub_of(text: str) -> list[Public]:
    """Return the lines of a stub.

    Raises: ValueError: if it holds anything but `from .module import Name as Name`.
    """
    rows = []
    for node in ast.parse(text).body:
        if not isinstance(node, ast.ImportFrom) or node.level != 1:
            raise ValueError(f"line {node.lineno} of the stub is not `from .module import Name as Name`")
        rows += [Public(node.module, alias.name, alias.asname) for alias in node.names]
    return rows


def flaws(rows: list[Public]) -> list[str]:
    """Return what is wrong with the lines themselves; their order is ruff's business."""
    names = [row.name for row in rows]
    found = [f"{row.name} must be written `as {row.name}`" for row in rows if row.shown_as != row.name]
    found += [f"{name} is promised twice" for name in sorted({name for name in names if names.count(name) > 1})]
    return found + [f"{name} is not public by its name" for name in names if name.startswith("_")]


def is_documented(value: object, source: ast.Module, name: str) -> bool:
    """Say whether somebody wrote down what `value` is; a docstring that `dataclass` made up does not count."""
    if isinstance(value, ModuleType):
        return bool(value.__doc__)
    if inspect.isclass(value) or inspect.isroutine(value):
        own = str(vars(value).get("__doc__") or "") if inspect.isclass(value) else value.__doc__ or ""
        return bool(own) and not own.startswith(f"{name}(")
    # A constant or an alias has no docstring of its own: the text stands below it.
    following = zip(source.body, source.body[1:], strict=False)
    return any(name in bound_by(node) and is_text(after) for node, after in following)


def bound_by(node: ast.stmt) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def is_text(node: ast.stmt) -> bool:
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def stub_rows(package: str) -> list[Public]:
    return stub_of((ROOT / package / "__init__.pyi").read_text(encoding="utf-8"))


def public_names() -> list[tuple[str, Public]]:
    return [(package, row) for package in PACKAGES for row in stub_rows(package)]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_a_docstring_and_a_lazy_stub(package: str) -> None:
    body = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")).body
    assert is_text(body[0])
    assert [ast.dump(node) for node in body[1:]] == [ast.dump(node) for node in ast.parse(LAZY).body]
    assert (ROOT / package / "py.typed").is_file()


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_what_the_stub_promises_sorted_and_once(package: str) -> None:
    module = importlib.import_module(package)
    assert flaws(stub_rows(package)) == []
    assert module.__all__ == sorted(row.name for row in stub_rows(package))
    assert dir(module) == module.__all__


@pytest.mark.parametrize(("package", "row"), public_names(), ids=lambda value: getattr(value, "name", value))
def test_a_public_name_can_be_imported_and_says_what_it_is(package: str, row: Public) -> None:
    value = getattr(importlib.import_module(package), row.name)
    home = importlib.import_module(f"{package}.{row.module}" if row.module else f"{package}.{row.name}")
    assert row.module is None or value is getattr(home, row.name)
    assert home.__file__ is not None
    assert is_documented(value, ast.parse(Path(home.__file__).read_text(encoding="utf-8")), row.name)


@pytest.mark.parametrize(("package", "row"), public_names(), ids=lambda value: getattr(value, "name", value))
def test_a_public_name_is_public_where_it_lives(package: str, row: Public) -> None:
    home = importlib.import_module(f"{package}.{row.module}" if row.module else package)
    assert row.name in getattr(home, "__all__", dir(home))


def test_importing_every_package_loads_neither_torch_nor_flower() -> None:
    heavy = ("torch", "numpy", "flwr", "opacus", "sklearn", "matplotlib", "pydantic", "typer")
    code = f"import sys, {', '.join(PACKAGES)}; print([name for name in {heavy} if name in sys.modules])"
    command = [sys.executable, "-c", code]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert outcome.stdout == "[]\n"


def test_a_name_that_no_stub_promises_is_an_attribute_error() -> None:
    for package in PACKAGES:
        with pytest.raises(AttributeError, match="no_such_name"):
            _ = importlib.import_module(package).no_such_name


@pytest.mark.parametrize(
    ("stub", "said"),
    [
        ("from .a import X", "X must be written `as X`"),
        ("from .a import X as Y", "X must be written `as X`"),
        ("from .a import X as X\nfrom .b import X as X", "X is promised twice"),
        ("from .a import _x as _x", "_x is not public by its name"),
    ],
)
def test_a_flaw_in_a_stub_is_found(stub: str, said: str) -> None:
    assert flaws(stub_of(stub)) == [said]


@pytest.mark.parametrize("stub", ["import os", "x = 1", "from ..a import X as X", "from torch import Tensor as Tensor"])
def test_a_stub_that_is_more_than_a_list_is_refused(stub: str) -> None:
    with pytest.raises(ValueError, match="line 1 of the stub is not"):
        stub_of(stub)


DOCUMENTED = '''
from dataclasses import dataclass

class Plain: pass

class Base:
    """It says what it is."""

class Inherits(Base): pass

@dataclass
class Generated:
    x: int

@dataclass
class Written:
    """It says what it is."""
    x: int

def silent(): pass

def speaks():
    """Return nothing."""

Alias = int | str
"""It says what it is."""
Other = int | str
LIMIT: int = 3
"""In bytes."""
'''


@pytest.mark.parametrize(
    ("name", "documented"),
    [
        ("Plain", False),
        ("Base", True),
        ("Inherits", False),
        ("Generated", False),
        ("Written", True),
        ("silent", False),
        ("speaks", True),
        ("Alias", True),
        ("Other", False),
        ("LIMIT", True),
    ],
)
def test_only_written_documentation_counts(name: str, documented: bool, tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(DOCUMENTED)
    spec = importlib.util.spec_from_file_location("planted", tmp_path / "planted.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["planted"] = module
    try:
        spec.loader.exec_module(module)
        assert is_documented(getattr(module, name), ast.parse(DOCUMENTED), name) == documented
    finally:
        del sys.modules["planted"]
