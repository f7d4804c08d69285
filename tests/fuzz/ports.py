"""Fuzzing of `quietport ports --from-ss`: no crash, no row lost, and never "fine" for what is no ss output.

`python -m tests.fuzz.ports --seconds 60` changes real outputs at random; `one` is the target for an engine
that brings its own input (`atheris.Setup(sys.argv, one)`). An input that breaks a promise is kept.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from quietport.errors import HostProgramError
from quietport.ports import Judged, report
from quietport.ports_cli import from_text, table

SEEDS = Path(__file__).parents[1] / "unit/ss_outputs"
OUTPUT = Path("build/fuzz-ports")
# What the parser looks for, and what names of processes may imitate.
TOKENS = tuple(
    token.encode("latin-1")
    for token in (
        *("LISTEN", "UNCONN", "ESTAB", "tcp", "udp", "v_str", "Netid", "State", "users:((", "))", '",pid='),
        *(
            ",fd=3)",
            '("',
            "(",
            ")",
            '"',
            "\n",
            "\r\n",
            "\t",
            " ",
            "\x00",
            "\xff",
            "\x1b[2J",
            "%lo",
            "%",
            "::",
        ),
        *("[::]:22", "0.0.0.0:*", "*:22", "*:*", "127.0.0.1:53", "[::ffff:1.2.3.4]:1", "99999999999", "-1"),
        *("\u00b2", "\x85", "\x0b", "tcp LISTEN 0 128 127.0.0.1:1 0.0.0.0:*\n"),
    )
)
CANARY = b'tcp   LISTEN 0      128          0.0.0.0:4444       0.0.0.0:*    users:(("canary",pid=77,fd=3))\n'


def broken_promise(data: bytes) -> str:
    """What `data` breaks, as a sentence; "" when every promise holds."""
    try:
        judged = read(data)
        if judged is not None:
            document = report(judged)
            table(json.loads(json.dumps(document))["listeners"])
            if document["ok"] != all(one.verdict != "violation" for one in judged):
                return "the report says fine and has a violation"
            if judged == [] and b"State" not in data:
                return "a text without a header and without a row is a quiet host"
        if read(data + b"\ngarbage\n") is not None:
            return "a line of garbage was passed over"
        later = read(data + b"\n" + CANARY)
    except Exception as error:  # any other than the one that is agreed on is a crash
        return f"it crashed: {type(error).__name__}: {error}"
    if later is not None and not any(_is_canary(one) for one in later):
        return "a row was lost"
    if judged is not None and later is not None and len(later) != len(judged) + 1:
        return "a row that comes later changes what was read before"
    return ""


def read(data: bytes) -> list[Judged] | None:
    """The listeners in `data`; None when it is refused, as agreed."""
    try:
        return from_text(data.decode(errors="replace"))
    except HostProgramError:
        return None


def _is_canary(entry: Judged) -> bool:
    return (entry.listener.port, entry.verdict, entry.process) == (4444, "violation", "canary")


def one(data: bytes) -> None:
    """The target for a fuzzing engine. Raises AssertionError for a broken promise."""
    if problem := broken_promise(data):
        raise AssertionError(problem)


def mutations(seeds: Sequence[bytes], generator: random.Random) -> Iterator[bytes]:
    """Endless inputs: real outputs with pieces taken out, put in, doubled, moved and mixed."""
    while True:
        data = bytearray(generator.choice(seeds))
        for _ in range(generator.randint(1, 6)):
            start = generator.randint(0, len(data))
            end = min(len(data), start + generator.choice((0, 1, 2, 8, 40, 200)))
            piece = bytes(data[start:end])
            other = generator.choice(seeds)
            at = generator.randint(0, len(other))
            data[start:end] = generator.choice(
                (
                    b"",
                    piece * 2,
                    piece[::-1],
                    generator.choice(TOKENS),
                    generator.choice(TOKENS) + piece,
                    other[at : at + generator.randint(0, 120)],
                    bytes(generator.randrange(256) for _ in range(generator.randint(1, 4))),
                )
            )
        yield bytes(data)


def search(seed: int, *, seconds: float, inputs: int | None = None) -> tuple[int, bytes, str]:
    """Try `inputs` inputs at most, for `seconds` at most: how many, and the first that breaks a promise."""
    seeds = [path.read_bytes() for path in sorted(SEEDS.glob("*.txt"))]
    deadline = time.monotonic() + seconds
    tried = 0
    # Reproducible on purpose: this is no secret.
    for data in mutations(seeds, random.Random(seed)):  # noqa: S311
        if time.monotonic() > deadline or tried == inputs:
            break
        tried += 1
        if problem := broken_promise(data):
            return tried, data, problem
    return tried, b"", ""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when nothing was found, 1 when something was."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.ports", description=summary)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    options = parser.parse_args(argv)
    tried, data, problem = search(options.seed, seconds=options.seconds)
    print(f"{tried} inputs with --seed {options.seed}: {problem or 'every promise held'}")
    if not problem:
        return 0
    OUTPUT.mkdir(parents=True, exist_ok=True)
    kept = OUTPUT / f"seed-{options.seed}.txt"
    kept.write_bytes(data)
    print(f"The input is in {kept}: quietport ports --from-ss {kept}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
