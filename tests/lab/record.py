"""What a test saw when something went wrong, kept for the table in docs/when-things-go-wrong.md.

A row is what was done to the host, the sentence that the user sees, and the state after. A test records its
row after its assertions, so that the table says only what has just been proven.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENV = "QUIETPORT_RECORD"
AREAS = ("variant", "fault", "input")

# Names that the lab gives of its own; free names are told by `known_host`.
_DEFAULT_NAMES = re.compile(r"(?<![\w.-])[cv]1[23](?:-[a-z0-9-]+)?(?![\w-])")
_known: set[str] = set()

_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
# In this order; each replaces whole words. Times come before IPv6 addresses, which look alike.
_SUBSTITUTIONS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), word)
    for pattern, word in (
        (r"\be2e-[a-z0-9-]+-[0-9a-f]{4}\b", "RUN"),
        (r"(?<![\w/.-])(?:/[\w.+-]+)*/quietport-lab/[\w.-]+", "LAB"),
        (r"(?<![\w/.-])/(?:var/)?tmp/[\w./+-]*[\w/+-]", "TEMP"),
        (r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d(?::\d\d(?:[.,]\d+)?)?(?: ?(?:Z|UTC|[+-]\d\d:?\d\d))?", "TIME"),
        (r"\b\d{4}-\d\d-\d\d\b", "DATE"),
        (r"(?<![\w:.])\d\d:\d\d:\d\d(?:\.\d+)?(?![\w:])", "TIME"),
        (r"\b[\w.-]+@[\w.-]+(?= \(process)", "USER@MACHINE"),
        (r"\bSHA256:[A-Za-z0-9+/=]{20,}", "SHA256:ID"),
        (r"\b[0-9A-F]{40}\b", "ID"),
        (r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", "ID"),
        (r"\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{8,}\b", "ID"),
        (r"\b\d+(?:\.\d+)? ?(ms|s|sec|seconds?|min|minutes?)\b", r"N \1"),
        (r"\b(pid|PID|process) \d+\b", r"\1 N"),
        (r"(?<![\w.])\d{5,}(?![\w.])", "N"),
    )
)
_ADDRESS = re.compile(
    r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}(?!\w)|[0-9a-fA-F]{0,4}(?::[0-9a-fA-F.]{0,15}){2,8}(?![\w:]))"
)
# Addresses that mean the same on every run: they are the point of a sentence.
_LASTING = tuple(
    ipaddress.ip_network(text)
    for text in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32", "127.0.0.0/8")
)


@dataclass(frozen=True, order=True)
class Row:
    """One line of the table."""

    area: str
    """One of AREAS."""
    what: str
    """The variant, the fault or the wrong input, in words."""
    sees: str
    """The sentence the user sees."""
    after: str
    """The state after, in words."""


def directory() -> Path:
    """Where the rows of the test run are kept: QUIETPORT_RECORD, else a place under build/."""
    return Path(os.environ.get(ENV) or ROOT / "build/when-things-go-wrong")


def known_host(name: str) -> None:
    """Have this name of a lab's target written as HOST from now on."""
    _known.add(name)


def record(area: str, what: str, *, sees: str, after: str, hosts: Iterable[str] = ()) -> None:
    """Add a row to the table; call it after the assertions that prove it.

    `area` is one of AREAS. `sees` is taken from the output of the run as it is; what differs from run to
    run (addresses, times, ids, places) is replaced here. The names of the lab's targets, and those in
    `hosts`, are replaced in all cells. May be called by several threads and processes. Raises ValueError
    for an unknown area or a row with an empty cell.
    """
    if area not in AREAS:
        raise ValueError(f"area {area!r} is none of {', '.join(AREAS)}")
    names = {*_known, *hosts}
    row = Row(area, nameless(what, names), normal(sees, hosts=names), nameless(after, names))
    if not all((row.what, row.sees, row.after)):
        raise ValueError(f"a row with an empty cell: {row}")
    place = directory()
    place.mkdir(parents=True, exist_ok=True)
    # One write to a file that is only appended to: lines of several writers do not mix.
    fd = os.open(place / f"{os.getpid()}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(fd, (json.dumps(asdict(row)) + "\n").encode())
    finally:
        os.close(fd)


def recorded(place: Path | None = None) -> frozenset[Row]:
    """Every row that was recorded there (default: `directory()`), each once."""
    files = sorted((place or directory()).glob("*.jsonl"))
    lines = [line for file in files for line in file.read_text().splitlines() if line]
    return frozenset(Row(**json.loads(line)) for line in lines)


def plain(text: str) -> str:
    """The text without colours and other terminal sequences."""
    return _ESCAPES.sub("", text)


def sentence_of(text: str) -> str:
    """The line of a converge's output that says what went wrong, without pyinfra's prefix, or nothing.

    A refusal or our reason for a failure is preferred, then our own command's error, then pyinfra's, then
    any line about an error.
    """
    lines = [line.strip() for line in plain(text).splitlines()]
    wanted: tuple[Callable[[str], bool], ...] = (
        lambda line: "refused:" in line or ": failed: " in line,
        lambda line: line.startswith("quietport:"),
        lambda line: "pyinfra error:" in line,
        lambda line: re.search(r"\berror\b", line, re.IGNORECASE) is not None,
    )
    for is_wanted in wanted:
        for line in filter(is_wanted, lines):
            return re.sub(r"^(?:--> )?(?:\[[^\]]+\] +)?", "", line)
    return ""


def normal(text: str, *, hosts: Iterable[str] = ()) -> str:
    """The text as one line that is the same on every run: what is in here by chance is named, not shown."""
    text = " ".join(plain(text).split())
    text = re.sub(rf"{re.escape(str(ROOT))}/?", "", text)
    for pattern, word in _SUBSTITUTIONS:
        text = pattern.sub(word, text)
    return nameless(_ADDRESS.sub(_address, text), hosts)


def nameless(text: str, hosts: Iterable[str] = ()) -> str:
    """The text as one line, with HOST for the names of targets."""
    text = " ".join(plain(text).split())
    for name in sorted(hosts, key=len, reverse=True):
        text = re.sub(rf"(?<![\w./-]){re.escape(name)}(?![\w-]|\.\w)", "HOST", text)
    return _DEFAULT_NAMES.sub("HOST", text)


def _address(found: re.Match[str]) -> str:
    word = found.group().rstrip(".")
    rest = found.group()[len(word) :]
    # "c13:" or a sentence's colon may stand behind an address.
    if word.endswith(":") and not word.endswith("::"):
        word, rest = word[:-1], ":" + rest
    try:
        address = ipaddress.ip_address(word)
    except ValueError:
        return found.group()
    lasting = address.is_unspecified or address.is_loopback or any(address in net for net in _LASTING)
    return found.group() if lasting else f"ADDRESS{rest}"
