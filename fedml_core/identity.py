"""Who is who: a site's two keys, the operator's key, and the roster of sites that it signs.

This is the door; each has a file of its own. The server side of TLS is in `fedml_core.tls`.
"""

from __future__ import annotations

from fedml_core.operator_key import OPERATOR_FILE, OPERATOR_PUBLIC_FILE, new_operator_key, read_operator_key
from fedml_core.pinned_roster import PinnedRoster, pin_roster
from fedml_core.roster import Roster, Site, enrol, read_roster, revoke, sign_roster
from fedml_core.site_keys import (
    KEYS_FILE,
    PUBLIC_FILE,
    PublicKeys,
    SiteKeys,
    new_site_keys,
    node_key_bytes,
    public_half,
    read_public_keys,
    read_site_keys,
    write_public_keys,
)

__all__ = [
    "KEYS_FILE",
    "OPERATOR_FILE",
    "OPERATOR_PUBLIC_FILE",
    "PUBLIC_FILE",
    "PinnedRoster",
    "PublicKeys",
    "Roster",
    "Site",
    "SiteKeys",
    "enrol",
    "new_operator_key",
    "new_site_keys",
    "node_key_bytes",
    "pin_roster",
    "public_half",
    "read_operator_key",
    "read_public_keys",
    "read_roster",
    "read_site_keys",
    "revoke",
    "sign_roster",
    "write_public_keys",
]
