"""Clients in safetensors files: one packed file that is mapped, or a folder with one file a client."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.numpy

from fedml_core.errors import ConfigError
from simulations.sources.columns import Array
from simulations.sources.folder import FolderReader
from simulations.sources.mapped import MappedFile, open_packed
from simulations.sources.source import Reader, Source

SUFFIX = ".safetensors"
DTYPES: Mapping[str, str] = {
    "BOOL": "?",
    "U8": "<u1",
    "I8": "<i1",
    "I16": "<i2",
    "I32": "<i4",
    "I64": "<i8",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
}
"""Safetensors' names of the types that NumPy and torch share."""


@dataclass(frozen=True)
class SafetensorsClients(Source):
    """Clients in one packed safetensors file, or in a folder with one `.safetensors` a client, by name.

    Tensors are called `inputs` (or `inputs_0`, `inputs_1`, ...), `targets`, if wanted `weights`, and with `test_` in
    front what a client keeps aside. A packed file also has `offsets` of shape (clients + 1,): client k's are the rows
    from offsets[k] to offsets[k + 1]; `write_packed` writes one. It must not be changed while it is in use.
    """

    def open(self) -> Reader:
        """Return a reader: a file is mapped, a folder listed."""
        path = Path(self.path)
        if path.is_dir():
            return FolderReader(path, SUFFIX, _loaded)
        if not path.exists():
            raise ConfigError(f"{path} does not exist; name a {SUFFIX} file, or a folder with one a client")
        return open_packed(path, lambda file: _mapped(path, file))


def _mapped(path: Path, file: MappedFile) -> dict[str, Array]:
    try:
        with safetensors.safe_open(str(path), framework="numpy"):
            pass  # it has checked that the header is sound and lies within the file
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error
    length = int(file.array(0, "<u8", (1,))[0])
    header = json.loads(file.array(8, "<u1", (length,)).tobytes())
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name} is {entry['dtype']}; store one of {', '.join(DTYPES)}")
        found[name] = file.array(8 + length + entry["data_offsets"][0], DTYPES[entry["dtype"]], entry["shape"])
    return found


def _loaded(path: Path) -> dict[str, Array]:
    return dict(safetensors.numpy.load_file(path))
