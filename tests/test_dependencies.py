"""What we import is declared, what is declared is pinned, and the pins satisfy the declaration."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Mapping
from importlib.metadata import packages_distributions, requires

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.sources import PACKAGES, ROOT, our_files, uses_of

FLOWER_BRINGS = ("httpx", "protobuf", "starlette", "uvicorn")
FLOWER_EMBEDDED = re.compile(r"(server|clients)/fleet(_\w+)?\.py")
"""These files run inside Flower's own server and speak its format: its pin, not ours, must choose the versions."""


def project() -> Mapping[str, object]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        table: dict[str, object] = tomllib.load(file)["project"]
    return table


def declared() -> list[Requirement]:
    rows = project()["dependencies"]
    assert isinstance(rows, list)
    return [Requirement(row) for row in rows]


def extras() -> list[Requirement]:
    groups = project()["optional-dependencies"]
    assert isinstance(groups, dict)
    return [Requirement(row) for rows in groups.values() for row in rows]


def pins(text: str) -> dict[str, SpecifierSet]:
    """Return the pins of a constraints file.

    Raises: ValueError: if a line is neither a comment nor one exact pin (`==1.2.3` or `==1.2.*`), or pins twice.
    """
    found: dict[str, SpecifierSet] = {}
    for line in filter(None, (line.split("#")[0].strip() for line in text.splitlines())):
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if not re.fullmatch(r"==[0-9][0-9a-z.]*(\.\*)?", str(requirement.specifier)) or name in found:
            raise ValueError(f"{line!r} is not the one exact pin of a package")
        found[name] = requirement.specifier
    return found


def our_pins() -> dict[str, SpecifierSet]:
    return pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))


def undeclared(files: Mapping[str, str], known: set[str]) -> list[str]:
    """Return the imports whose distribution is not in `known`."""
    homes = packages_distributions()
    found = []
    for use in uses_of(files):
        top = use.target.split(".")[0]
        if use.is_import and top not in (*PACKAGES, *sys.stdlib_module_names):
            names = {canonicalize_name(name) for name in homes.get(top, [top])}
            embedded = names & set(FLOWER_BRINGS) if FLOWER_EMBEDDED.fullmatch(use.file) else set()
            if not names & known | embedded:
                found.append(f"{use}, from {', '.join(sorted(names))}, which pyproject.toml does not declare")
    return found


def test_everything_we_import_is_a_declared_dependency() -> None:
    assert undeclared(our_files(), {canonicalize_name(row.name) for row in declared()}) == []


def test_an_import_that_nobody_declared_is_found() -> None:
    text = "import os\nimport uvicorn\nimport torch\nfrom fedml_core import Frame\n"
    said = "server/x.py:2 imports uvicorn, from uvicorn, which pyproject.toml does not declare"
    assert undeclared({"server/x.py": text}, {"torch"}) == [said]
    assert undeclared({"server/fleet_listener.py": text}, {"torch"}) == []


def test_what_the_fleet_takes_from_flower_is_what_flower_requires() -> None:
    required = {canonicalize_name(Requirement(row).name) for row in requires("flwr") or []}
    assert required >= set(FLOWER_BRINGS)


@pytest.mark.parametrize("row", [*declared(), *extras()], ids=lambda row: row.name)
def test_each_dependency_has_a_pin_that_its_declaration_admits(row: Requirement) -> None:
    pin = our_pins()[canonicalize_name(row.name)]
    version = next(iter(pin)).version.replace(".*", ".0")
    assert row.specifier.contains(version)


@pytest.mark.parametrize("line", ["numpy>=2", "numpy", "numpy==2.4.6,<3", "numpy==1\nNumPy==1", "torch==2.13.0+cpu"])
def test_a_line_that_is_not_one_exact_pin_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="not the one exact pin"):
        pins(line)


def test_no_pin_names_a_place() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "://" not in text
    assert "torch==2.13.0\n" in text
    assert "flwr==1.41.*\n" in text
