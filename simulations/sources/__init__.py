"""Where virtual clients' data come from: files that are read a client at a time, or a function that makes them.

Importing this package makes every source known by name.
"""

from simulations.sources.generated import Generated
from simulations.sources.held import Held
from simulations.sources.npz import NpzClients
from simulations.sources.parquet import ParquetClients
from simulations.sources.safetensors_files import SafetensorsClients
from simulations.sources.source import Reader, Source
from simulations.sources.write import write_packed

__all__ = [
    "Generated",
    "Held",
    "NpzClients",
    "ParquetClients",
    "Reader",
    "SafetensorsClients",
    "Source",
    "write_packed",
]
