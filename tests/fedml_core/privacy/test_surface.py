"""What `fedml_core.privacy` promises to users of the library is there, documented, and enough to keep books with."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from fedml_core.errors import RefusalError
from fedml_core.privacy import Account, Budget, Claim, Ledger, Purpose, epsilon_of, noise_for
from tests.sources import ROOT
from tests.test_public_surface import Public, flaws, is_documented, stub_of

PACKAGE = "fedml_core.privacy"
STUB = ROOT / "fedml_core" / "privacy" / "__init__.pyi"
ROWS = stub_of(STUB.read_text(encoding="utf-8"))
NEEDED = {
    "counting": {"Claim", "epsilon_of", "noise_for", "outlook", "Terms", "canonical", "checked"},
    "books": {"Account", "Budget", "Entry", "Ledger", "Purpose"},
    "strategies": {"AdaptiveClip", "BandedNoise", "TreeNoise", "GaussianIntegers", "SkellamIntegers"},
    "transforms": {"ClipByNorm", "LocalGaussian", "ServerGaussian"},
}


def test_all_is_what_the_stub_promises_sorted_and_once() -> None:
    module = importlib.import_module(PACKAGE)
    assert flaws(ROWS) == []
    assert module.__all__ == sorted(row.name for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_public_name_is_public_where_it_lives_and_says_what_it_is(row: Public) -> None:
    home = importlib.import_module(f"{PACKAGE}.{row.module}")
    value = getattr(importlib.import_module(PACKAGE), row.name)
    assert value is getattr(home, row.name) and row.name in home.__all__
    assert not inspect.ismodule(value)
    assert home.__file__ is not None
    assert is_documented(value, ast.parse(Path(home.__file__).read_text(encoding="utf-8")), row.name)


@pytest.mark.parametrize("purpose", NEEDED)
def test_nothing_that_a_user_needs_is_missing(purpose: str) -> None:
    assert NEEDED[purpose] <= {row.name for row in ROWS}


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "scipy", "dp_accounting", "cryptography", "sqlite3")
    code = f"import sys, {PACKAGE}; print([name for name in {heavy} if name in sys.modules])"
    outcome = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (outcome.stdout, outcome.stderr) == ("[]\n", "")


def test_books_can_be_kept_with_what_is_public(tmp_path: Path) -> None:
    unit, adjacency = "client", "add-or-remove-one"
    noise = noise_for(
        2.0, 1e-5, lambda z: [{"name": "gaussian", "noise_multiplier": z}] * 4, unit=unit, adjacency=adjacency
    )
    event = {"name": "gaussian", "noise_multiplier": noise}
    account, ledger = Account("ward-a", unit, adjacency), Ledger(tmp_path / "ledger.sqlite")
    budget = Budget(epsilon=2.0, delta=1e-5, unit=unit, adjacency=adjacency)
    for number in (1, 2, 3, 4):
        ledger.reserve(event, account, Purpose("run", "server", number), budget=budget)
    with pytest.raises(RefusalError, match="and this round would make it"):
        ledger.reserve(event, account, Purpose("run", "server", 5), budget=budget)
    spent = ledger.spent(account, 1e-5)
    assert isinstance(spent, Claim)
    assert spent == epsilon_of([event] * 4, delta=1e-5, unit=unit, adjacency=adjacency)
    assert 1.99 < spent.epsilon <= 2.0
