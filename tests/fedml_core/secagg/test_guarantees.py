"""What the modules of secure aggregation promise is what the tests quote, sentence by sentence."""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache

import pytest

from tests.sources import ROOT, our_files

PACKAGE = "fedml_core/secagg/"
PROMISES = ("Guarantees", "Trust")
SECTION = re.compile(r"^(?P<name>[A-Z]\w+):(?= |$)")
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstrings(text: str) -> list[str]:
    nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, DOCUMENTED))
    return [inspect.cleandoc(found) for node in nodes if (found := ast.get_docstring(node))]


def promises(text: str) -> list[tuple[str, str]]:
    """Return (section, sentence) for each sentence of a Guarantees or Trust section in a module's docstrings."""
    found = []
    for docstring in docstrings(text):
        section, lines = None, list[str]()
        for line in [*docstring.splitlines(), ""]:
            header = SECTION.match(line)
            if section and (header or not line.strip()):
                found += [(section, sentence) for sentence in re.split(r"(?<=\.)\s+", " ".join(lines))]
                section = None
            if header and header["name"] in PROMISES:
                section, lines = header["name"], [line[header.end() :].strip()]
            elif section:
                lines.append(line.strip())
    return found


def plain(text: str) -> str:
    """Return `text` without line breaks, quotation marks and comment signs, so that a quotation may be wrapped."""
    return " ".join(re.sub(r"^\s*#|[\"\\]", " ", text, flags=re.MULTILINE).split())


@cache
def quoted() -> str:
    return plain("\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("test_*.py"))))


def modules() -> dict[str, str]:
    return {
        file: text
        for file, text in our_files().items()
        if file.startswith(PACKAGE) and file.endswith(".py") and not file.endswith("__init__.py")
    }


@pytest.mark.parametrize("file", modules())
def test_each_promise_of_a_module_is_quoted_by_a_test(file: str) -> None:
    unquoted = [sentence for _, sentence in promises(modules()[file]) if plain(sentence) not in quoted()]
    assert unquoted == []


@pytest.mark.parametrize("file", modules())
def test_each_module_says_what_it_guarantees_and_whom_it_trusts(file: str) -> None:
    assert {section for section, _ in promises(modules()[file])} == set(PROMISES)


def test_a_promise_is_found_in_every_docstring_and_cut_into_sentences() -> None:
    text = '''"""A module.

Guarantees: one thing holds. Another
    holds, too.
Trust: nobody.
"""
class C:
    def f(self):
        """Return.

        Guarantees: `x` stays.
        Raises: E: never.
        """
'''
    assert promises(text) == [
        ("Guarantees", "one thing holds."),
        ("Guarantees", "Another holds, too."),
        ("Trust", "nobody."),
        ("Guarantees", "`x` stays."),
    ]


def test_a_promise_that_no_test_quotes_is_seen() -> None:
    invented = "the moon " + "is made of secrets."
    assert plain(invented) not in quoted()
    assert plain("the moon\n    # is made of\n    secrets.") == plain(invented)
