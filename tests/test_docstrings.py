"""The examples in docstrings do what they show."""

from __future__ import annotations

import doctest
import importlib

import pytest

from tests.sources import our_files

PROMPT = ">>> "


def modules_with_examples() -> list[str]:
    return [file.removesuffix(".py").replace("/", ".") for file, text in our_files().items() if PROMPT in text]


def failures_of(examples: list[doctest.DocTest]) -> int:
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for example in examples:
        runner.run(example)
    return runner.failures


@pytest.mark.parametrize("name", modules_with_examples())
def test_the_examples_in_a_module_are_true(name: str) -> None:
    module = importlib.import_module(name)
    examples = [example for example in doctest.DocTestFinder().find(module) if example.examples]
    assert examples, f"{name} shows a prompt outside a docstring, where nobody runs it"
    assert failures_of(examples) == 0


@pytest.mark.parametrize(("text", "failures"), [(">>> 1 + 1\n2\n", 0), (">>> 1 + 1\n3\n", 1), (">>> 1 / 0\n0\n", 1)])
def test_an_example_that_is_not_true_is_counted(text: str, failures: int) -> None:
    assert failures_of([doctest.DocTestParser().get_doctest(text, {}, "planted", "planted.py", 0)]) == failures
