"""What is installed with us, by `uv.lock`."""

from __future__ import annotations

import tomllib
from pathlib import Path

LOCK = Path(__file__).parents[2] / "uv.lock"


def test_pandas_is_not_among_the_dependencies() -> None:
    # Ray Serve imports it where it is there, in each of its processes, to turn a DataFrame into
    # JSON. That was a third of the time that the imports of a gateway took.
    names = {package["name"] for package in tomllib.loads(LOCK.read_text())["package"]}
    assert "ray" in names
    assert "pandas" not in names
