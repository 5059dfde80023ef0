"""How a cohort's work is done on this machine. One engine a file; all give the same answer.

Importing this package makes every engine known by name.
"""

from simulations.engines.engine import Engine
from simulations.engines.processes import Processes
from simulations.engines.sequential import Sequential

__all__ = ["Engine", "Processes", "Sequential"]
