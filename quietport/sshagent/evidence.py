"""What the audit says about how long sessions last, for the decision on a shorter TTL.

    codex-openclaw-ssh-agent-ttl-evidence [--json] [--since 7d] [--runtime-root DIR]

Counted are sessions that began within --since and had their key. One that its TTL ended is as long as its
TTL, though its command may have wanted more; of one that crashed unseen the length is unknown.
Days are covered from the first line of the audit, or the beginning of --since, to now. There is no verdict
before 7 full days are: exit code 3. The verdict is the shortest candidate that would have cut no session.

JSON, schema 1: since (UTC), days_covered, full_days, days_with_sessions, sessions {count, stopped, expired,
crashed, running, unknown_length}, duration_s {p50, p90, p95, max} (nearest rank, null without sessions),
candidates [{ttl, ttl_s, cut, share}], damaged_lines, verdict {ttl, ttl_s} or null, missing (sentences).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from quietport.errors import FINE, UNKNOWN, USAGE, printable
from quietport.sshagent import audit
from quietport.sshagent.names import (
    EVIDENCE_PROGRAM,
    SCHEMA,
    AgentAccessError,
    duration,
    now,
    seconds_of,
    stamp,
)
from quietport.sshagent.root import MissingError, open_root

NEEDED_DAYS = 7
CANDIDATES_S = (300, 600, 900, 1200, 1800, 2700, 3600, 7200, 14400, 28800, 43200)
_DAY_S = 86400
_MAX_SINCE_S = 3650 * _DAY_S
_USAGE = f"usage: {EVIDENCE_PROGRAM} [--json] [--since 7d] [--runtime-root DIR] [--version]\n\n"


@dataclass(frozen=True)
class Candidate:
    """A TTL and how many sessions it would have cut; `share` is of those with a known length."""

    ttl: str
    ttl_s: int
    cut: int
    share: float


@dataclass(frozen=True)
class Evidence:
    """What is printed; see the beginning of this module."""

    since: str
    days_covered: float
    full_days: int
    days_with_sessions: int
    sessions: dict[str, int]
    duration_s: dict[str, float | None]
    candidates: list[Candidate]
    damaged_lines: int
    verdict: dict[str, Any] | None
    missing: list[str]

    def to_json(self) -> str:
        """The document."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1)


def gather(trail: audit.Trail, *, moment: datetime, since_s: int) -> Evidence:
    """What `trail` says about sessions that began in the last `since_s` seconds before `moment`."""
    begin = moment - timedelta(seconds=since_s)
    created = {one.id: one.at for one in trail.events if one.event == "created" and begin <= one.at <= moment}
    loaded = {one.id for one in trail.events if one.event == "key_loaded"}
    ends: dict[str, audit.Event] = {}
    for one in trail.events:
        if one.event in audit.ENDS:
            ends.setdefault(one.id, one)
    counted = [session for session in created if session in loaded]
    kinds = [ends[session].event if session in ends else "running" for session in counted]
    lengths = sorted(
        length
        for session in counted
        if session in ends and (length := _length(ends[session].more.get("duration_s"))) is not None
    )
    covered = _covered(trail, begin=begin, moment=moment)
    full_days = int(covered)
    candidates = [_candidate(ttl, lengths) for ttl in CANDIDATES_S]
    missing = _missing(full_days, since_s, lengths)
    kept = [candidate for candidate in candidates if candidate.cut == 0]
    verdict = {"ttl": kept[0].ttl, "ttl_s": kept[0].ttl_s} if kept and not missing else None
    return Evidence(
        since=stamp(begin),
        days_covered=round(covered, 2),
        full_days=full_days,
        days_with_sessions=len({created[session].date() for session in counted}),
        sessions={
            "count": len(counted),
            **{kind: kinds.count(kind) for kind in ("stopped", "expired", "crashed", "running")},
            "unknown_length": len(counted) - len(lengths) - kinds.count("running"),
        },
        duration_s={
            "p50": _rank(lengths, 0.5),
            "p90": _rank(lengths, 0.9),
            "p95": _rank(lengths, 0.95),
            "max": lengths[-1] if lengths else None,
        },
        candidates=candidates,
        damaged_lines=trail.damaged,
        verdict=verdict,
        missing=missing,
    )


def text_of(evidence: Evidence) -> str:
    """The same for people."""
    counts = evidence.sessions
    lines = [
        f"since {evidence.since}: {evidence.days_covered:g} days covered, sessions on "
        f"{evidence.days_with_sessions} days",
        f"{counts['count']} sessions: {counts['stopped']} stopped, {counts['expired']} ended by their TTL, "
        f"{counts['crashed']} crashed, {counts['running']} still running; "
        f"{counts['unknown_length']} of unknown length",
    ]
    if evidence.duration_s["max"] is not None:
        lines.append(
            "length: " + ", ".join(f"{name} {value:g} s" for name, value in evidence.duration_s.items())
        )
        lines += [
            f"a TTL of {one.ttl} would have cut {one.cut} ({one.share:.1%})" for one in evidence.candidates
        ]
    if evidence.damaged_lines:
        lines.append(f"{evidence.damaged_lines} damaged lines of the audit were left out")
    if evidence.missing:
        lines += ["insufficient evidence", *evidence.missing]
    elif evidence.verdict is None:
        lines.append(
            f"verdict: none of these TTLs, up to {duration(CANDIDATES_S[-1])}, would have cut no session"
        )
    else:
        lines.append(f"verdict: a TTL of {evidence.verdict['ttl']} would have cut no session")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Print the evidence; returns 0 with a verdict, 3 without enough evidence, 2 usage, 125 a failure."""
    try:
        return _main(argv)
    except AgentAccessError as error:
        print(f"{EVIDENCE_PROGRAM}: {printable(str(error))}", file=sys.stderr)
        return error.code


def _main(argv: Sequence[str]) -> int:
    as_json, since_s, chosen = False, NEEDED_DAYS * _DAY_S, None
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if word in ("--help", "-h"):
            print(_USAGE + (__doc__ or ""), end="")
            return FINE
        if word == "--version":
            from quietport.sshagent.version import version

            print(f"{EVIDENCE_PROGRAM} {version()}")
            return FINE
        if word == "--json":
            as_json = True
        elif name in ("--since", "--runtime-root"):
            if not equals and not rest:
                raise AgentAccessError(f"{name} needs a value.", code=USAGE)
            value = value if equals else rest.pop(0)
            if name == "--since":
                since_s = _since(value)
            else:
                chosen = value
        else:
            raise AgentAccessError(f"{word!r} is not an option of it: --help shows them.", code=USAGE)
    try:
        root = open_root(chosen, create=False, sockets=False)
    except MissingError:
        trail = audit.Trail([], 0)
    else:
        try:
            trail = audit.read(root)
        finally:
            root.close()
    evidence = gather(trail, moment=now(), since_s=since_s)
    print(evidence.to_json() if as_json else text_of(evidence))
    return UNKNOWN if evidence.missing else FINE


def _since(text: str) -> int:
    try:
        seconds = seconds_of(text)
    except ValueError:
        seconds = 0
    if not 1 <= seconds <= _MAX_SINCE_S:
        raise AgentAccessError(f"--since {text!r} is not a time such as 7d, 36h or 90m.", code=USAGE)
    return seconds


def _covered(trail: audit.Trail, *, begin: datetime, moment: datetime) -> float:
    """Days from the first line of the audit, or from `begin`, to `moment`."""
    past = [one.at for one in trail.events if one.at <= moment]
    if not past:
        return 0.0
    return (moment - max(begin, min(past))).total_seconds() / _DAY_S


def _missing(full_days: int, since_s: int, lengths: Sequence[float]) -> list[str]:
    missing = []
    if since_s < NEEDED_DAYS * _DAY_S:
        missing.append(
            f"--since is shorter than {NEEDED_DAYS} days: ask for at least --since {NEEDED_DAYS}d."
        )
    elif full_days < NEEDED_DAYS:
        left = NEEDED_DAYS - full_days
        missing.append(
            f"{left} more full day{'s are' if left > 1 else ' is'} needed: the audit covers {full_days} of "
            f"{NEEDED_DAYS}."
        )
    if not lengths:
        missing.append("There is no session whose length is known.")
    return missing


def _candidate(ttl: int, lengths: Sequence[float]) -> Candidate:
    # A session that its TTL ended at this very length might have gone on: it counts as cut.
    cut = sum(1 for length in lengths if length >= ttl)
    return Candidate(duration(ttl), ttl, cut, round(cut / len(lengths), 4) if lengths else 0.0)


def _length(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        return None
    return float(value)


def _rank(lengths: Sequence[float], share: float) -> float | None:
    """The nearest rank: the smallest length that `share` of all do not exceed."""
    if not lengths:
        return None
    return lengths[max(0, math.ceil(share * len(lengths)) - 1)]
