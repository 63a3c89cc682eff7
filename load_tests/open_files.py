"""How many files a load test, and what it starts, may have open."""

from __future__ import annotations

import resource


def raise_file_limit() -> None:
    """Allow as many as the system does: a stream costs a part two descriptors.

    What is started from here inherits it.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
