"""Values as JSON that every parser reads: NaN and infinity, which JSON does not have, become null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def json_value(value: Any) -> Any:
    """Return `value` with every float that is not finite as None, mappings as dicts and tuples as lists."""
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Return `value` as JSON text without NaN; on one line unless `indent` is given."""
    separators = (",", ":") if indent is None else None
    return json.dumps(json_value(value), allow_nan=False, indent=indent, separators=separators)
