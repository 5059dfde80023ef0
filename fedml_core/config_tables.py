"""What a file's tables have in common: frozen, checked whole on load, and able to say where a mistake came from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from fedml_core.config_errors import explain
from fedml_core.errors import ConfigError
from fedml_core.toml_file import override, read_toml

__all__ = ["ConfigFile", "Table", "Text"]

Text = Annotated[str, Field(min_length=1)]


class Table(BaseModel):
    """A table; an unknown key, an infinity or a NaN is a mistake."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class ConfigFile(Table):
    """A whole file. What is made without one has an empty path."""

    _path: Path = PrivateAttr(default=Path())
    _overridden: tuple[tuple[str, ...], ...] = PrivateAttr(default=())

    @property
    def path(self) -> Path:
        """Return the file that this was read from."""
        return self._path

    @property
    def folder(self) -> Path:
        """Return the folder to which the file's paths are relative."""
        return self._path.parent

    def beside(self, path: str) -> Path:
        """Return a path of the file as one that can be opened from the working directory."""
        return self.folder / Path(path).expanduser()

    def source_of(self, *tables: str) -> str:
        """Return where tables such as "clients.examples" came from: the file, with what the command line changed."""
        places = [tuple(table.split(".")) for table in tables]
        changed = [
            ".".join(key)
            for key in dict.fromkeys(self._overridden)
            if any(key[: len(place)] == place[: len(key)] for place in places)
        ]
        return " ".join([f"{self._path}", *(["with"] if changed else []), *(f"--set {key}" for key in changed)])

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str]) -> Self:
        """Return the file at `path`; `overrides` as `fedml_core.config.load_run`.

        Raises: ConfigError: a line for each mistake, with file, key, value and what is allowed.
        """
        table = read_toml(path)
        from_command_line = [override(table, item) for item in overrides]
        try:
            config = cls.model_validate(table, strict=True)
        except ValidationError as error:
            raise ConfigError(explain(error, cls, str(path), from_command_line)) from None
        config._path, config._overridden = path, tuple(from_command_line)
        return config
