"""A first project: a commented task, a run.toml and a site.toml that run as they are."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fedml_core.errors import ConfigError

FILES = {"task.py": "task.py", "run.toml": "run.toml", "site.toml": "site.toml", "README.md": "readme.txt"}
"""What is written, and the template that it is written from."""


def write_project(folder: Path) -> list[Path]:
    """Write the project into `folder`, which is made if there is none, and return the files' paths.

    Raises: ConfigError: if something else is there, or it cannot be written; nothing of the user's is overwritten.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; name a new or empty folder")
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty; name a new or empty folder")
        folder.mkdir(parents=True, exist_ok=True)
        templates = files("simulations") / "templates"
        for name, template in FILES.items():
            (folder / name).write_text((templates / template).read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}; name another folder") from error
    return [folder / name for name in FILES]
