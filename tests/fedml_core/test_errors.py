"""The tree that is drawn is the tree that is raised."""

from __future__ import annotations

import inspect
import re

import pytest

from fedml_core import errors
from fedml_core.errors import FedveilError, RefusalError, ReplyError

LINE = re.compile(r"^(?P<stem>[│ ]*(?:[├└]── )?)(?P<name>[A-Z]\w+Error)\b(?P<text>.*)$")
INDENT = 4


def drawn() -> list[tuple[str, str | None, str]]:
    """Return (name, parent, text) for each line of the tree in the module's docstring."""
    parents: list[str] = []
    rows: list[tuple[str, str | None, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        if found := LINE.match(line):
            depth = len(found["stem"]) // INDENT
            del parents[depth:]
            rows.append((found["name"], parents[-1] if parents else None, found["text"]))
            parents.append(found["name"])
    return rows


def test_the_drawing_names_every_error_once() -> None:
    assert sorted(name for name, _, _ in drawn()) == errors.__all__
    classes = [name for name, value in vars(errors).items() if inspect.isclass(value)]
    assert sorted(classes) == errors.__all__


@pytest.mark.parametrize(("name", "parent", "text"), drawn())
def test_each_error_descends_from_the_one_above_it(name: str, parent: str | None, text: str) -> None:
    error = getattr(errors, name)
    assert error.__base__ is (getattr(errors, parent) if parent else Exception)
    if promised := re.search(r"exit code (\d)", text):
        assert error.exit_code == int(promised[1])


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_ends_a_command_with_one_or_two(name: str) -> None:
    assert getattr(errors, name).exit_code in (1, 2)


def test_what_the_user_can_mend_exits_with_two() -> None:
    mendable = {name for name in errors.__all__ if getattr(errors, name).exit_code == 2}
    assert mendable == {
        "CheckpointError",
        "ConfigError",
        "PrivacyError",
        "SpecMismatchError",
        "StrategyError",
        "TaskError",
    }


@pytest.mark.parametrize("kind", [ReplyError, RefusalError])
def test_an_attributed_error_carries_its_rule_beside_its_message(kind: type[ReplyError | RefusalError]) -> None:
    error = kind("finite", "client 3 sent a value that is not finite; it is excluded")
    assert error.rule == "finite"
    assert str(error) == "client 3 sent a value that is not finite; it is excluded"


def test_one_clause_catches_everything_raised_on_purpose() -> None:
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), FedveilError)
        assert not issubclass(getattr(errors, name), OSError | ValueError)
