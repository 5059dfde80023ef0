"""What the README shows is there and runs: its commands, its Python, its links."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.shown_commands import (
    Block,
    blocks,
    commands,
    flaws,
    inline_commands,
    is_performable,
    make_targets,
    perform,
    words_of,
)
from tests.simulations.project_cases import USERS, nothing_stays
from tests.sources import ROOT

PAGE = (ROOT / "README.md").read_text(encoding="utf-8")
AT_LEAST = {"make": 2, "pip": 1, "fedveil": 3}
"""How often the README must show each program; fewer, and it no longer says how to begin."""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with nothing_stays():
        yield


def execute(block: Block) -> None:
    """Run a block as a script would, in a module of its own; a traceback points into the README."""
    module = ModuleType(f"{USERS}readme")
    sys.modules[module.__name__] = module
    text = "\n" * (block.line - 1) + block.text
    exec(compile(text, str(ROOT / "README.md"), "exec", dont_inherit=True), vars(module))


def links(page: str) -> list[str]:
    """Return the page's links to files of the checkout, without the place inside them."""
    found = (target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", page))
    return [target for target in found if target and ":" not in target]


def test_it_shows_how_to_begin() -> None:
    programs = [words_of(command)[0] for command in commands(PAGE)]
    assert {name: programs.count(name) >= least for name, least in AT_LEAST.items()} == dict.fromkeys(AT_LEAST, True)
    assert len(blocks(PAGE, "python")) >= 2
    assert len(links(PAGE)) >= 3


def test_its_commands_name_what_exists() -> None:
    assert flaws([*commands(PAGE), *inline_commands(PAGE)]) == []


def test_its_commands_run_one_after_the_other() -> None:
    shown = [command for command in commands(PAGE) if is_performable(command)]
    assert {words_of(command)[1] for command in shown} >= {"init", "simulate"}
    for command in shown:
        result = perform(command)
        assert result.exit_code == 0, f"{command}: {result.output}"


@pytest.mark.parametrize("block", blocks(PAGE, "python"), ids=lambda block: f"line {block.line}")
def test_its_python_runs(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    execute(block)
    assert bool(capsys.readouterr().out) == ("print(" in block.text)


def test_python_that_fails_is_found_with_its_line() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        execute(Block("python", 7, "x = 1\nx / 0\n"))
    assert caught.traceback[-1].lineno + 1 == 8


@pytest.mark.parametrize("target", links(PAGE))
def test_its_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


def test_every_block_is_of_a_language_that_is_checked() -> None:
    languages = re.findall(r"^```(\w*)$", PAGE, re.MULTILINE)
    assert set(languages[::2]) <= {"console", "python", "toml"}
    assert set(languages[1::2]) == {""}


def test_what_make_lists_is_what_it_can_make() -> None:
    assert make_targets() == ["help", "env", "demo", "test", "check", "format", "bench", "clean"]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("fedveil simulat run.toml", "No such command 'simulat'"),
        ("fedveil simulate run.toml --cental", "No such option '--cental'"),
        ("fedveil simulate run.toml --rounds many", "'many' is not a valid integer"),
        ("fedveil simulate examples/no_such/run.toml", "there is no examples/no_such/run.toml"),
        ("fedveil keys enrol", "Missing argument 'PUBLIC'"),
        ("fedveil", "fedveil needs a command"),
        ("make dmeo", "lists no target 'dmeo'"),
        ("PLACE=1 python examples/no_such.py", "there is no examples/no_such.py"),
        ("python -m no_such_module", "there is no module 'no_such_module'"),
        ("pip install fedvail", "'fedvail' is not this checkout"),
        ("pip install '.[no_such]'", "there is no extra no_such"),
        ("flwr rnu .", "No such command 'rnu'"),
        ("flower-megalink --insecure", "there is no program 'flower-megalink'"),
    ],
)
def test_a_command_that_names_nothing_is_found(command: str, said: str) -> None:
    (flaw,) = flaws([command])
    assert said in flaw


def test_commands_are_read_from_console_blocks_and_sentences() -> None:
    page = (
        "Say `make test`.\n```console\n$ fedveil init demo \\\n  --json\nwrote it\n$ ls\n```\n```toml\n$ no = 1\n```\n"
    )
    assert commands(page) == ["fedveil init demo    --json", "ls"]
    assert inline_commands(page) == ["make test"]
    assert flaws(["fedveil init demo", "fedveil simulate demo/run.toml"]) == []
