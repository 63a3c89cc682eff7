"""How long a second `make run` takes to its first answer, beside bare vLLM's own start.

    .venv/bin/python -m load_tests.starts --rounds 3

Both load the model of `configs/local-cpu.yaml` with the same arguments, in turn, each alone on the
machine. A start ends with the first answer of one token. Ours is what `make run` does: the check of
the set-up, then `comp-ai up` on a data folder that an earlier start has left. Writes
`load_tests/results/starts.{json,md}`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from load_tests.bench.asking import Door, Question
from load_tests.bench.report import machine
from load_tests.bench.systems import bare_vllm
from tests.serve_configs import REAL_MODEL
from tests.stack_runner import PROJECT, start_stack, wait_until

RESULTS = Path(__file__).parent / "results"
_WITHIN_S = 600
_TARGET = 1.15


def _until_answered(door: Door) -> None:
    body = Question(model=REAL_MODEL, tokens=1, stream=False).body()

    def answered() -> bool:
        try:
            url = f"{door.url}/v1/chat/completions"
            return httpx.post(url, json=body, headers=door.headers, timeout=60).is_success
        except httpx.HTTPError:
            return False

    wait_until(answered, "a first answer", _WITHIN_S)


def _bare_s() -> float:
    begun_s = time.monotonic()
    with bare_vllm() as bare:
        _until_answered(bare.door)
        return time.monotonic() - begun_s


def _ours_s(home: Path) -> float:
    begun_s = time.monotonic()
    subprocess.run(["make", "--quiet", "setup"], cwd=PROJECT, check=True)
    stack = start_stack(home, None)
    try:
        _until_answered(Door(url=stack.url, headers=stack.bootstrap))
        return time.monotonic() - begun_s
    finally:
        stack.stop()


def report(bare_s: Sequence[float], ours_s: Sequence[float]) -> str:
    """Return the table of the starts, in seconds, taken in turn."""
    ratios = [ours / bare for ours, bare in zip(ours_s, bare_s, strict=True)]
    ratio = statistics.median(ratios)
    rows = "\n".join(
        f"| {name} | {statistics.median(taken):.1f} | {', '.join(f'{s:.1f}' for s in taken)} |"
        for name, taken in (("bare vLLM", bare_s), ("a second `make run`", ours_s))
    )
    verdict = "reached" if ratio <= _TARGET else "not reached"
    return (
        f"{machine()}. Seconds from the command to the first answer of one token.\n\n"
        f"| start of | median | each |\n| --- | --- | --- |\n{rows}\n\n"
        f"Ratio {ratio:.2f} (rounds {', '.join(f'{one:.2f}' for one in ratios)}); "
        f"target ≤ {_TARGET}: {verdict}.\n"
    )


def main() -> None:
    """Measure, and write what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    bare_s, ours_s = [], []
    with tempfile.TemporaryDirectory(prefix="cai-", ignore_cleanup_errors=True) as folder:
        print(f"first run: {_ours_s(Path(folder)):.1f} s", flush=True)
        for _ in range(rounds):
            bare_s.append(_bare_s())
            ours_s.append(_ours_s(Path(folder)))
            print(f"bare {bare_s[-1]:.1f} s, ours {ours_s[-1]:.1f} s", flush=True)
    text = report(bare_s, ours_s)
    RESULTS.joinpath("starts.md").write_text(text, encoding="utf-8")
    data = {"machine": machine(), "bare_s": bare_s, "ours_s": ours_s}
    RESULTS.joinpath("starts.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
