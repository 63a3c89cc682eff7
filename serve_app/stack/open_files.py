"""How many files, and so connections, a process of this machine may have open."""

from __future__ import annotations

import resource

# What asks for more has other bounds before this one.
_MOST = 65536


def most_open_files() -> int:
    """Return the hard limit: more cannot be had without being root."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
