"""Clients in NumPy's .npz files: one packed file that is mapped, or a folder with one file a client."""

from __future__ import annotations

import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedml_core.errors import ConfigError
from simulations.sources.columns import Array
from simulations.sources.folder import FolderReader
from simulations.sources.mapped import MappedFile, open_packed
from simulations.sources.source import Reader, Source

_SUFFIX = ".npz"
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a member of a zip archive: signature, length of name, length of extra


@dataclass(frozen=True)
class NpzClients(Source):
    """Clients in one packed file that `numpy.savez` wrote, or in a folder with one `.npz` a client, by name.

    Arrays are called as in `SafetensorsClients`. A packed file must not be compressed; one a client may be.
    """

    def open(self) -> Reader:
        """Return a reader: a file is mapped, a folder listed."""
        path = Path(self.path)
        if path.is_dir():
            return FolderReader(path, _SUFFIX, _loaded)
        if not path.exists():
            raise ConfigError(f"{path} does not exist; name an {_SUFFIX} file, or a folder with one a client")
        return open_packed(path, lambda file: _mapped(path, file))


def _mapped(path: Path, file: MappedFile) -> dict[str, Array]:
    """Return the archive's arrays where they lie, which its members tell only if they are stored as they are."""
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED:
                    raise ValueError("it is compressed, so its rows can only be read all at once; use numpy.savez")
                name = member.filename.removesuffix(".npy")
                with archive.open(member) as stream:
                    version = np.lib.format.read_magic(stream)
                    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else _read_header_2_0
                    shape, fortran, dtype = read(stream)
                    start = _data_of(file, member.header_offset) + stream.tell()
                if fortran and len(shape) > 1:
                    raise ValueError(f"{name} is in Fortran order; write numpy.ascontiguousarray of it")
                if dtype.hasobject:
                    raise ValueError(f"{name} holds Python objects; write numbers")
                found[name] = file.array(start, dtype, shape)
    except zipfile.BadZipFile as error:
        raise ValueError(str(error)) from error
    return found


def _read_header_2_0(stream: object) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)  # type: ignore[arg-type]  # a binary stream
    return shape, fortran, dtype


def _data_of(file: MappedFile, header: int) -> int:
    """Return where the data of the member begin whose local header is at byte `header`."""
    signature, name, extra = _LOCAL_HEADER.unpack(file.array(header, "u1", (_LOCAL_HEADER.size,)).tobytes())
    if signature != b"PK\x03\x04":
        raise ValueError("a member of the archive is not where its index says")
    return int(header + _LOCAL_HEADER.size + name + extra)


def _loaded(path: Path) -> dict[str, Array]:
    # Opened here: what is no archive is left open by NumPy.
    with path.open("rb") as file:
        archive = np.load(file)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it is no .npz archive")
        with archive:
            return {name: archive[name] for name in archive.files}
