"""Import this before our other packages: it checks that what Python finds under our names is ours.

`python -m` puts the working directory first on the module path, so a user's server.py there would be imported in the
place of ours, and fail in some puzzling way. Nothing but the standard library is imported here.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

_NAMES = ("fedml_core", "strategies", "clients", "server")
_HERE = Path(__file__).resolve().parent.parent
_REMEDY = "rename it, or run the command fedveil from there, which does not look into the working directory"


def impostors() -> Iterator[tuple[str, str]]:
    """Yield each of our package names under which Python would import something else, and where that is."""
    for name in _NAMES:
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if origin != _HERE / name / "__init__.py":
            yield name, str(origin or "nowhere")


def refuse_impostors() -> None:
    """Exit with one line and code 2 if one of our packages would be imported from elsewhere."""
    for name, place in impostors():
        sys.stderr.write(f"error: {name!r} is fedveil's own package, but Python finds {place}; {_REMEDY}\n")
        raise SystemExit(2)


refuse_impostors()
