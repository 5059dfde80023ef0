"""Reads the commands that a Markdown page shows, and says which of them name something that does not exist.

A command is a line `$ ...` of a block fenced as console; other lines there are output. Paths start at the checkout's
root.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path, PurePosixPath

import click
import click.testing
import typer

from simulations.app import app
from tests.simulations.project_cases import fedveil
from tests.sources import ROOT

_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:fedveil|make) [^`\n]+)`")
_PROMPT = "$ "
_OUTPUTS = ("folder", "out")
"""What our commands call a folder that they make."""


@dataclass(frozen=True)
class Block:
    """One fenced block: what stands in it, and the page's line number of its first line."""

    language: str
    line: int
    text: str


def blocks(page: str, language: str) -> list[Block]:
    """Return the page's blocks that are fenced as `language`."""
    found = (
        Block(match["language"], page.count("\n", 0, match.start("text")) + 1, match["text"])
        for match in _FENCE.finditer(page)
    )
    return [block for block in found if block.language == language]


def commands(page: str) -> list[str]:
    """Return the commands of the page's console blocks, in order, without their prompts."""
    text = "\n".join(block.text for block in blocks(page, "console")).replace("\\\n", " ")
    return [line.removeprefix(_PROMPT).strip() for line in text.splitlines() if line.startswith(_PROMPT)]


def inline_commands(page: str) -> list[str]:
    """Return the commands `fedveil ...` and `make ...` that stand between backticks in the page's sentences."""
    return _INLINE.findall(_FENCE.sub("", page))


def make_targets() -> list[str]:
    """Return the targets of the Makefile that are meant to be made by name: those that its help lists."""
    return re.findall(r"^([a-z]+):.*?## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def flaws(shown: Sequence[str]) -> list[str]:
    """Return what the commands of one page name that does not exist.

    A path is a word with a slash; it exists in the checkout, or below a folder that an earlier command makes.
    """
    made: set[PurePosixPath] = set()
    return [f"{command!r}: {flaw}" for command in shown for flaw in _flaws(words_of(command), made)]


def words_of(command: str) -> list[str]:
    """Return the command's words, without comment and without variables that are set for it."""
    words = shlex.split(command, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    return words


def perform(command: str) -> click.testing.Result:
    """Run a `fedveil init`, `simulate` or `list` as it is shown, but for one round and no plots, in this process.

    Files of the checkout are read there; what the command writes goes to the working directory.
    """
    words = [str(ROOT / word) if "/" in word and (ROOT / word).exists() else word for word in words_of(command)]
    shorter = ("--rounds", "1", "--no-plots") if words[1] == "simulate" else ()
    return fedveil(*words[1:], *shorter)


def is_performable(command: str) -> bool:
    """Say whether `perform` can run the command: alone, and in moments."""
    return words_of(command)[0] == "fedveil" and words_of(command)[1:2] in (["init"], ["simulate"], ["list"])


def _flaws(words: Sequence[str], made: set[PurePosixPath]) -> Iterator[str]:
    program, rest = PurePosixPath(words[0]).name, words[1:]
    check = _CHECKS.get(program)
    if check is None and program not in _scripts():
        yield f"there is no program {program!r}"
        return
    if check is not None:
        yield from check(rest)
    paths = [word for word in rest if "/" in word and "://" not in word]
    if program == "fedveil":
        made.update(_made(rest))
    yield from (f"there is no {path}" for path in paths if not _is_there(path, made))


def _is_there(path: str, made: set[PurePosixPath]) -> bool:
    place = PurePosixPath(path)
    return (ROOT / place).exists() or any(place.is_relative_to(folder) for folder in made)


def _scripts() -> dict[str, str]:
    return {script.name: script.value for script in entry_points(group="console_scripts")}


def _parsed(group: click.Command, name: str, words: Sequence[str]) -> click.Context:
    """Return the context of the innermost command, its arguments parsed; nothing is run.

    Raises: click.UsageError: if a command, an option or an argument does not exist, is missing or is malformed.
    """
    command, rest, parent = group, list(words), click.Context(group, info_name=name)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        named, found, rest = command.resolve_command(parent, rest)
        assert found is not None
        command, parent = found, click.Context(found, parent=parent, info_name=named)
    return command.make_context(parent.info_name, rest, parent=parent.parent)


def _usage_flaws(group: click.Command, name: str, words: Sequence[str]) -> list[str]:
    try:
        _parsed(group, name, words)
    except click.exceptions.NoArgsIsHelpError:
        return [f"{name} needs a command"]
    except click.UsageError as error:
        return [error.format_message()]
    except click.exceptions.Exit:  # --help and --version end here
        return []
    return []


def _fedveil(words: Sequence[str]) -> list[str]:
    return _usage_flaws(typer.main.get_command(app), "fedveil", words)


def _made(words: Sequence[str]) -> list[PurePosixPath]:
    """Return the folders that a command of ours would make."""
    try:
        context = _parsed(typer.main.get_command(app), "fedveil", words)
    except (click.UsageError, click.exceptions.Exit):
        return []
    given = (context.params.get(name) for name in _OUTPUTS)
    return [PurePosixPath(folder) for folder in given if isinstance(folder, str | Path)]


def _flwr(words: Sequence[str]) -> list[str]:
    (script,) = entry_points(group="console_scripts", name="flwr")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Flower's own command, in what it asks of typer
        return _usage_flaws(typer.main.get_command(script.load()), "flwr", words)


def _make(words: Sequence[str]) -> list[str]:
    targets = [word for word in words if "=" not in word and not word.startswith("-")]
    return [f"the Makefile lists no target {target!r}" for target in targets if target not in make_targets()]


def _python(words: Sequence[str]) -> list[str]:
    if words[:1] == ["-m"]:
        return [] if importlib.util.find_spec(words[1]) else [f"there is no module {words[1]!r}"]
    return [f"{word!r} is no Python file" for word in words[:1] if not word.endswith(".py")]


def _pip(words: Sequence[str]) -> list[str]:
    extras = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    )
    found = []
    for word in (word for word in words[1:] if not word.startswith("-")):
        own = re.fullmatch(r"\.(?:\[(?P<extras>[\w,]+)\])?", word)
        if own is None:
            found.append(f"{word!r} is not this checkout, and nowhere else to be had yet")
        elif unknown := set(filter(None, (own["extras"] or "").split(","))) - extras:
            found.append(f"there is no extra {', '.join(sorted(unknown))}")
    return found


def _nothing(words: Sequence[str]) -> list[str]:
    return []


_CHECKS: Mapping[str, Callable[[Sequence[str]], list[str]]] = {
    "fedveil": _fedveil,
    "flwr": _flwr,
    "make": _make,
    "python": _python,
    "python3": _python,
    "pip": _pip,
    "git": _nothing,
    "cd": _nothing,
}
