"""A folder with one file a client."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors

from fedml_core.data import ClientData
from fedml_core.errors import ConfigError, TaskError
from simulations.sources.columns import TEST, Array, Columns, refuse_unknown
from simulations.sources.source import Reader


class FolderReader(Reader):
    """A reader of the files in a folder that end in `suffix`, in the order of their names, which are all it keeps."""

    def __init__(self, folder: Path, suffix: str, arrays_of: Callable[[Path], Mapping[str, Array]]) -> None:
        with os.scandir(folder) as entries:
            self._names = sorted(entry.name for entry in entries if entry.name.endswith(suffix))
        if not self._names:
            raise ConfigError(f"{folder} holds no file that ends in {suffix}; put one there for each client")
        self._folder, self._arrays_of = folder, arrays_of

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(self._names)

    def read(self, client: int) -> ClientData:
        """Return what the client's file holds."""
        path = self._folder / self._names[client]
        try:
            arrays = self._arrays_of(path)
            refuse_unknown(arrays, str(path))
            held = any(name.startswith(TEST) for name in arrays)
            test = Columns.of(arrays, str(path), TEST).examples() if held else None
            return ClientData(Columns.of(arrays, str(path)).examples(), test)
        except ConfigError as error:
            raise TaskError(f"client {client}'s file {error}") from error
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, safetensors.SafetensorError) as error:
            raise TaskError(f"client {client}'s file {path} cannot be read: {error}; write it again") from error
