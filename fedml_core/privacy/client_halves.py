"""Imports every client half of privacy that comes with fedveil, so that each is known by its name.

Guarantees: whoever imports this knows every client half of privacy that comes with fedveil.
Trust: as each of them says.
"""

from __future__ import annotations

import fedml_core.privacy.adaptive_clip
import fedml_core.privacy.clipping
import fedml_core.privacy.distributed_noise
import fedml_core.privacy.local  # noqa: F401 - subclassing makes a class known by name
