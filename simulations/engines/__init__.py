"""How a cohort's work is done on this machine. One engine a file; all give the same answer.

Importing this package makes every engine known by name.
"""

from simulations.engines.auto import Auto
from simulations.engines.engine import Engine
from simulations.engines.fused import Fused
from simulations.engines.processes import Processes
from simulations.engines.ray import Ray
from simulations.engines.sequential import Sequential
from simulations.engines.suited import Suited
from simulations.engines.tuned import Tuned
from simulations.engines.vectorised import Vectorised

__all__ = ["Auto", "Engine", "Fused", "Processes", "Ray", "Sequential", "Suited", "Tuned", "Vectorised"]
