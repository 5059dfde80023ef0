"""What may leave a site of an error: our own words where only they can be in it, else the names of classes."""

from __future__ import annotations

from fedml_core.errors import FedveilError, RefusalError, ReplyError
from fedml_core.loading import place_in_task

__all__ = ["only_ours", "redacted"]


def redacted(error: FedveilError) -> str:
    """Return what a server may know of an error: our own words where only they can be in it, else classes.

    Guarantees: no text of the user's own code, and no path.
    """
    if isinstance(error, ReplyError | RefusalError) and only_ours(error):
        return str(error)
    cause = error.__cause__
    names = type(error).__name__ if cause is None else f"{type(error).__name__} from {type(cause).__name__}"
    return f"{names}; the site's own log says more"


def only_ours(error: BaseException) -> bool:
    """Return whether no line of the user's own code had a part in an error's words."""
    causes: list[BaseException] = []
    while error not in causes:
        causes.append(error)
        error = error.__cause__ or error
    return all(place_in_task(cause) is None for cause in causes)
