"""Lets a fuzzer look for bytes at which what reads strangers' messages does anything but read or refuse them.

    python -m tests.adversary.fuzz [--kind bulletin ...] [--seconds 120]
    python -m tests.adversary.fuzz --kind bulletin --input 667673610102

Kinds are those of `fedml_core.secagg.codec`, "transcript", and the frames "assignment", "reply" and "greeting"; by
default all, one after another, each in a process of its own. What it finds it prints as hexadecimal digits, for
`--input`, and ends with 1. It needs atheris, which is no dependency of the project: the fuzzer sees which branches of
ours an input takes, and goes after those not yet taken.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["main", "target_of"]

TRANSCRIPT = "transcript"
_FRAMES = ("assignment", "reply", "greeting")
_READINGS = 1_000
"""How many refusals of one party, after which another takes its place: a refusal may have changed it."""
_LONGEST = 8192
_OTHERS = (b"-1", b"{}", b"1e999", b"[[]]")
_INTO = "--into"


def names() -> list[str]:
    """Return every kind that can be asked for."""
    from fedml_core.secagg.codec import Kind

    return [*(kind.name.lower() for kind in Kind), TRANSCRIPT, *_FRAMES]


def target_of(name: str) -> tuple[Callable[[bytes], None], Sequence[bytes]]:
    """Return what reads an input as a kind, raising whatever is no refusal, and inputs to begin with."""
    if name == TRANSCRIPT:
        return _transcripts()
    return _frames(name) if name in _FRAMES else _messages(name)


def _messages(name: str) -> tuple[Callable[[bytes], None], Sequence[bytes]]:
    from fedml_core.errors import SecureAggregationError
    from fedml_core.secagg.codec import Kind
    from tests.adversary import decoders
    from tests.adversary.decoders import Due

    kind, waiting = Kind[name.upper()], list[Due]()

    def fresh() -> Due:
        one = decoders.due(kind)
        if one.session is not None:
            one.session.wipe = lambda: None  # an error ends a session; to begin anew each time would take a hundredfold
        return one

    def read(data: bytes) -> None:
        if not waiting:
            waiting.extend([fresh()] * _READINGS)
        try:
            waiting.pop().read(data)
        except SecureAggregationError as error:
            if not str(error):
                raise AssertionError("a refusal must say why") from error
        else:
            waiting.clear()  # what was read is not due again

    return read, [decoders.due(kind).message]


def _transcripts() -> tuple[Callable[[bytes], None], Sequence[bytes]]:
    from fedml_core.secagg import transcript
    from tests.fedml_core.secagg import transcript_cases as cases

    true = [(cases.secagg(3), cases.ROSTER), cases.assisted(3)]

    def check(place: int, value: Any) -> None:
        if not transcript.check(value, true[place][1]):
            raise AssertionError("a check must say what it found")

    return _json([json.dumps(one) for one, _ in true], check)


def _frames(name: str) -> tuple[Callable[[bytes], None], Sequence[bytes]]:
    from dataclasses import replace

    from tests.adversary.frame_decoders import FRAMES

    decoder = FRAMES[name]
    true = decoder.true()

    def check(place: int, value: Any) -> None:
        try:
            decoder.read(replace(true[place], header=json.dumps(value)))
        except decoder.refusals as error:
            if not str(error):
                raise AssertionError("a refusal must say why") from error

    return _json([one.header for one in true], check)


def _json(true: Sequence[str], check: Callable[[int, Any], None]) -> tuple[Callable[[bytes], None], Sequence[bytes]]:
    """Return what reads an input as JSON, or as where in one of the true texts what else is to stand."""

    def read(data: bytes) -> None:
        place = sum(data[:1]) % len(true)
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            value = _changed(json.loads(true[place]), data[1:])
        check(place, value)

    changes = [
        bytes([place, step]) + b"\xff" + other for place in range(len(true)) for step in (0, 2) for other in _OTHERS
    ]
    return read, [*(text.encode() for text in true), *changes]


def _changed(value: Any, data: bytes) -> Any:
    """Return a JSON value with something else at one place; bytes up to 255 choose the place, the rest what it is."""
    steps, _, other = data.partition(b"\xff")
    if not steps or not isinstance(value, dict | list) or not value:
        try:
            return json.loads(other)
        except (ValueError, RecursionError):
            return other.decode("latin-1")
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = keys[steps[0] % len(keys)]
    value[key] = _changed(value[key], steps[1:] + b"\xff" + other)
    return value


def _fuzz(name: str, seconds: int, into: Path) -> None:
    """Fuzz one kind in this process, which ends with it."""
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["fedml_core"], enable_loader_override=False):
        read, seeds = target_of(name)
    corpus = into / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
    flags = [f"-max_total_time={seconds}", f"-max_len={_LONGEST}", f"-artifact_prefix={into}/found-", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *flags, "-print_final_stats=1", str(corpus)], read)
    atheris.Fuzz()


def _search(name: str, seconds: int) -> bool:
    """Fuzz one kind in a process of its own and say what came of it; return whether nothing was found."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.adversary.fuzz", "--kind", name, "--seconds", str(seconds)]
        outcome = subprocess.run([*command, _INTO, folder], capture_output=True, text=True, check=False)
        found = [path.read_bytes() for path in sorted(Path(folder).glob("found-*"))]
    inputs = re.search(r"number_of_executed_units: (\d+)", outcome.stderr)
    if outcome.returncode == 0 and inputs and not found:
        _say(f"{name}: {inputs[1]} inputs, each read or refused")
        return True
    said = outcome.stdout + outcome.stderr
    _say("\n".join([f"{name}: FAILED", said, *(f"--kind {name} --input {one.hex()}" for one in found)]))
    return False


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", action="append", help="repeatable; by default, all")
    parser.add_argument("--seconds", type=int, default=120, help="for each kind")
    parser.add_argument("--input", type=bytes.fromhex, metavar="HEX", help="read this one input, without a fuzzer")
    parser.add_argument(_INTO, type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.into is not None:  # before anything is imported that the fuzzer is to look into
        _fuzz(asked.kind[0], asked.seconds, asked.into)
    kinds = asked.kind or names()
    if unknown := sorted(set(kinds) - set(names())):
        parser.error(f"--kind must be one of {', '.join(names())}, got {unknown[0]}")
    if asked.input is not None:
        for name in kinds:
            target_of(name)[0](asked.input)
        return 0
    if find_spec("atheris") is None:
        _say("fuzzing needs atheris, which is not installed; pip install atheris, in an environment of its own")
        return 2
    fine = [_search(name, asked.seconds) for name in kinds]
    return int(not all(fine))


if __name__ == "__main__":
    sys.exit(main())
