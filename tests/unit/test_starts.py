"""The table of the starts."""

from __future__ import annotations

import pytest

from load_tests.starts import report


@pytest.mark.parametrize(
    ("ours_s", "verdict"),
    [
        ([55.0, 46.0, 80.0], "Ratio 1.10 (rounds 1.10, 1.15, 1.00); target ≤ 1.15: reached."),
        ([60.0, 48.0, 96.0], "Ratio 1.20 (rounds 1.20, 1.20, 1.20); target ≤ 1.15: not reached."),
    ],
)
def test_rounds_are_compared_one_by_one(ours_s: list[float], verdict: str) -> None:
    text = report([50.0, 40.0, 80.0], ours_s)
    assert text.endswith(f"{verdict}\n")
    assert "| bare vLLM | 50.0 | 50.0, 40.0, 80.0 |" in text
