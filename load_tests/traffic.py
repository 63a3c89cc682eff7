"""Requests as people send them: when, how long a prompt, how long an answer.

`arrivals` makes them at random, after the two traces that Azure published in 2023: a conversation
service and a code service. The traces have no texts, and are not in this repository; the numbers
below were taken from them (their quantiles, and how much their minutes differ):

    Patel et al., "Splitwise: Efficient generative LLM inference using phase splitting", ISCA 2024,
    https://github.com/Azure/AzurePublicDataset, AzureLLMInferenceTrace_{conv,code}.csv, CC-BY 4.0

`read_trace` reads such a file itself, for whoever has one.
"""

from __future__ import annotations

import csv
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

_AT = (0.0, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 1.0)
_SLICE_S = 10.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: seconds after the beginning, and tokens of prompt and answer."""

    at_s: float
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What one of the traces is like. Quantiles at 0, 5, 10, 25, 50, 75, 90, 95, 99 and 100 %."""

    prompt_tokens: tuple[int, ...]
    answer_tokens: tuple[int, ...]
    # Requests in 10 s: their standard deviation over their mean.
    variation: float


KINDS = {
    # 19,366 requests in 58 minutes: 5.5 a second, 98 in the busiest 10 s.
    "conversation": Kind(
        prompt_tokens=(2, 181, 207, 396, 1020, 1189, 2735, 4083, 4142, 14050),
        answer_tokens=(7, 41, 54, 85, 129, 395, 424, 451, 601, 1000),
        variation=0.27,
    ),
    # 8,819 in 57 minutes: 2.6 a second, 327 in the busiest 10 s.
    "code": Kind(
        prompt_tokens=(3, 75, 147, 578, 1469, 2745, 5194, 7315, 7436, 7437),
        answer_tokens=(6, 6, 7, 9, 13, 24, 55, 90, 252, 1899),
        variation=1.67,
    ),
}


def arrivals(kind: Kind, *, per_s: float, length_s: float, seed: int) -> Iterator[Arrival]:
    """Yield requests in order for `length_s`, `per_s` a second in the mean, the same for a seed.

    Each 10 s have a rate of their own, drawn from a Gamma distribution with the variation of
    the trace, less what chance alone makes of a steady rate; within them they come at random.
    """
    chance = random.Random(seed)
    shape = _shape(kind.variation, per_s * _SLICE_S)
    begin_s = 0.0
    while begin_s < length_s:
        rate = per_s if shape is None else per_s * chance.gammavariate(shape, 1 / shape)
        at_s = begin_s
        end_s = min(begin_s + _SLICE_S, length_s)
        while rate > 0 and (at_s := at_s + chance.expovariate(rate)) < end_s:
            yield Arrival(
                at_s,
                length_at(kind.prompt_tokens, chance.random()),
                length_at(kind.answer_tokens, chance.random()),
            )
        begin_s += _SLICE_S


def _shape(variation: float, mean: float) -> float | None:
    """Return the Gamma's shape, or None where chance alone varies as much."""
    more = variation**2 - 1 / mean
    return None if more <= 0 else 1 / more


def length_at(quantiles: tuple[int, ...], part: float) -> int:
    """Return the length below which `part` of the lengths are, between two quantiles a line."""
    for index, (low, high) in enumerate(itertools.pairwise(_AT)):
        if part <= high:
            share = (part - low) / (high - low)
            return round(quantiles[index] + share * (quantiles[index + 1] - quantiles[index]))
    raise ValueError(f"{part} is no part of 1")


def read_trace(path: Path, *, faster: float = 1.0) -> Iterator[Arrival]:
    """Yield the requests of a file with TIMESTAMP, ContextTokens and GeneratedTokens, in order.

    `faster` says how many times as fast as it was.

    Raises:
        OSError: it cannot be read.
        KeyError, ValueError: it is not of that form.
    """
    begin: datetime | None = None
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            # Python knows microseconds, the file has tenths of them.
            at = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26])
            begin = begin or at
            yield Arrival(
                (at - begin).total_seconds() / faster,
                int(row["ContextTokens"]),
                int(row["GeneratedTokens"]),
            )
