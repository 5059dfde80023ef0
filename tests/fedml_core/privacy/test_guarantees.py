"""What the modules of differential privacy promise is what the tests quote, sentence by sentence."""

from __future__ import annotations

import pytest

from tests.fedml_core.secagg.test_guarantees import PROMISES, plain, promises, quoted
from tests.sources import our_files

PACKAGE = "fedml_core/privacy/"


def modules() -> dict[str, str]:
    return {
        file: text
        for file, text in our_files().items()
        if file.startswith(PACKAGE) and file.endswith(".py") and not file.endswith("__init__.py")
    }


def test_the_package_is_read() -> None:
    assert f"{PACKAGE}accounting.py" in modules()


@pytest.mark.parametrize("file", modules())
def test_each_promise_of_a_module_is_quoted_by_a_test(file: str) -> None:
    unquoted = [sentence for _, sentence in promises(modules()[file]) if plain(sentence) not in quoted()]
    assert unquoted == []


@pytest.mark.parametrize("file", modules())
def test_each_module_says_what_it_guarantees_and_whom_it_trusts(file: str) -> None:
    assert {section for section, _ in promises(modules()[file])} == set(PROMISES)
