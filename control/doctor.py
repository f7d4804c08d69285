"""`quietport doctor` on the operator's side: how the hosts are, by their own word and seen from outside.

What only an outsider can tell is looked at from here: does the path through the tailnet work, and is the
public side closed. With --json one object:

    {"schema": 1, "ok": every host passes or warns, "hosts": {NAME: {
     "state": "pass|warn|fail|unknown|unreachable", "error": the sentence why there is no report, or "",
     "tailnet": {"ok": bool, "reason": SENTENCE},
     "public": {"state": "closed|open|unknown", "open": ["tcp 203.0.113.7:22"], "reason": SENTENCES},
     "report": what `quietport doctor --json` printed there or null}}}

`open` are the ports that may not be; what hosts.toml declares is in `reason`, and so is what was not asked.
Exit code 1 when a host fails, is unreachable, gives no report, or has its public side open.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

from control import asking, outside, ports, proof
from control.errors import QuietportError, ReachError
from control.outside import PublicSide
from control.reach import combined, open_session, public_route
from control.scan import parse_ports
from control.session import Session, Way
from control.settings import settings_for
from quietport.doctor.model import Status
from quietport.errors import FINE, PROBLEM, UNKNOWN, printable
from quietport.table import aligned

LINKS_TIMEOUT_S = 20.0
SCAN_TIMEOUT_S = 60.0
# What the system's services have, and what databases, desktops, consoles and clusters usually have. A scan of
# all ports, 10 000 at a time, is more than a small router on the way remembers: `quietport verify` does it.
WELL_KNOWN = (
    "1-1024,1080,1194,1433,1521,1723,1883,2049,2222,2375-2380,3000,3128,3306,3389,4222,4243,4369,4443,5000,"
    "5001,5222,5432,5601,5672,5900,5901,5984,5985,6000,6379,6443,7000,7474,8000-8010,8080-8090,8123,8443,8500,"
    "8883,8888,9000,9001,9042,9090-9100,9200,9300,9443,10000,10250,11211,15672,19999,22222,25565,27017,32400,"
    "50000,51820"
)
LINKS = "ip -j addr show scope global"

State = Literal["pass", "warn", "fail", "unknown", "unreachable"]
# What the host's exit code is in each state of its report.
_CODES = {"pass": FINE, "warn": FINE, "fail": PROBLEM, "unknown": UNKNOWN}
_TEXTS = ("check", "status", "reason", "next_step")
_TROUBLE = (QuietportError, TimeoutError, OSError, EOFError)


class Said(NamedTuple):
    """A finding, the host's or one from outside, as the table shows it."""

    status: str
    check: str
    reason: str
    next_step: str = ""


@dataclass(frozen=True)
class Tailnet:
    """Whether a new login through the tailnet was accepted by sshd, and the sentence about it."""

    ok: bool
    reason: str


@dataclass(frozen=True)
class Row:
    """What is known of one host. `way`: how it was reached, None when it was not.

    `report` is the host's own, None when there is none; `error` then says why.
    """

    name: str
    tailnet: Tailnet
    public: PublicSide
    way: Way | None = None
    report: Mapping[str, Any] | None = None
    error: str = ""

    @property
    def state(self) -> State:
        """The worst of the host's own state and of what is seen from outside."""
        if self.way is None:
            return "unreachable"
        if self.public.open or not self.tailnet.ok:
            return "fail"
        if self.report is None:
            return "unknown"
        state: State = self.report["state"]
        return state

    @property
    def bad(self) -> bool:
        """Whether this host makes the exit code 1."""
        return self.state in ("fail", "unreachable") or self.report is None or bool(self.public.open)

    @property
    def findings(self) -> list[Said]:
        """Everything that somebody should look at, what is seen from outside first."""
        found = []
        if self.way is not None and not self.tailnet.ok:
            found.append(Said("FAIL", "tailnet path", self.tailnet.reason))
        if self.public.open:
            what = f"open: {', '.join(self.public.open)}."
            step = f"`quietport ports {self.name}` says whose they are, and how each is closed."
            found.append(Said("FAIL", "public side", what, step))
        checks = self.report["checks"] if self.report else []
        # With "could not tell" a check of the host is skipped, and then the host's state is unknown.
        return found + [
            Said(*(one[key] for key in ("status", "check", "reason", "next_step")))
            for one in checks
            if one["status"] in ("FAIL", "WARN") or one["reason"].startswith("could not tell")
        ]

    def to_json(self) -> dict[str, Any]:
        """The host in the document that --json prints."""
        public = {"state": self.public.state, "open": list(self.public.open), "reason": self.public.reason}
        return {
            "state": self.state,
            "error": self.error,
            "tailnet": {"ok": self.tailnet.ok, "reason": self.tailnet.reason},
            "public": public,
            "report": self.report,
        }


def run(names: Sequence[str], *, as_json: bool) -> int:
    """Examine these hosts, all by default, at once. A host that does not answer is a row.

    Raises SettingsError for a hosts file that cannot be used or an unknown name.
    """
    rows = asking.everyone(names, examine)
    if as_json:
        ok = all(row.state in ("pass", "warn") for row in rows)
        hosts = {row.name: row.to_json() for row in rows}
        print(json.dumps({"schema": asking.SCHEMA, "ok": ok, "hosts": hosts}))
    else:
        print(text(rows))
    return PROBLEM if any(row.bad for row in rows) else FINE


def examine(name: str) -> Row:
    """Log in, have the host examine itself, and look at it from outside. Never raises for a host's sake."""
    session, tailnet, error = _enter(name)
    if session is None:
        return Row(name, tailnet, _public_side(name, frozenset(), []), error=error)
    with session:
        report, error = _report(session)
        listening = _listening(session)
        links, untold = _links(session)
    public = _public_side(name, listening, links, untold)
    return Row(name, tailnet, public, session.way, report, error)


def _enter(name: str) -> tuple[Session | None, Tailnet, str]:
    """A session, what became of the way through the tailnet, and why there is no session, else ""."""
    try:
        session = open_session(name, way="tailnet", keys_only=True)
        return session, _path(session), ""
    except _TROUBLE as error:
        failure = error
    tailnet = Tailnet(ok=False, reason=asking.why(name, failure))
    try:
        return open_session(name, way="public"), tailnet, ""
    except _TROUBLE as error:
        if isinstance(failure, ReachError) and isinstance(error, ReachError):
            error = combined(name, [failure, error])
        return None, tailnet, asking.why(name, error)


def _path(session: Session) -> Tailnet:
    try:
        return Tailnet(ok=True, reason=proof.accepted(session).removeprefix(f"{session.name}: "))
    except _TROUBLE as error:
        return Tailnet(ok=False, reason=asking.why(session.name, error))


def _report(session: Session) -> tuple[dict[str, Any] | None, str]:
    try:
        return asking.report(session, "doctor", fits=_fits), ""
    except _TROUBLE as error:
        return None, asking.why(session.name, error)


def _fits(document: dict[str, Any], code: int) -> bool:
    """Whether it is a doctor's report, whose state is what its checks say and what the program ended with."""
    checks = document["checks"]
    if not (isinstance(checks, list) and checks and all(map(_is_check, checks))):
        return False
    # It is printed again with --json, within what is said of every host.
    if not _is_shallow(document):
        return False
    statuses = {one["status"] for one in checks}
    state = document["state"]
    worst = "fail" if "FAIL" in statuses else "warn" if "WARN" in statuses else "pass"
    told = state == worst or (state == "unknown" and worst != "fail")
    return told and _CODES[state] == code and document["ok"] is (state in ("pass", "warn"))


def _is_check(one: Any) -> bool:
    texts = isinstance(one, dict) and all(isinstance(one[key], str) for key in _TEXTS)
    return texts and one["status"] in get_args(Status)


def _is_shallow(value: Any, levels: int = 16) -> bool:
    """Whether values lie in each other at most so deep: a report has three levels, JSON may have hundreds."""
    within = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_shallow(one, levels - 1) for one in within)


def _listening(session: Session) -> frozenset[int]:
    """The TCP ports that the host itself says something listens at; none where it does not say."""
    try:
        listeners = ports.report(session)["listeners"]
    except _TROUBLE:
        return frozenset()
    found = [one.get("port") for one in listeners if one.get("protocol") == "tcp"]
    return frozenset(port for port in found if type(port) is int and 0 < port < 65536)


def _links(session: Session) -> tuple[list[Any], str]:
    """What `ip` on the host says of its global addresses, nothing where it does not say; and the sentence
    about an answer that is none."""
    try:
        printed = session.run(LINKS, timeout=LINKS_TIMEOUT_S).stdout
    except _TROUBLE:
        return [], ""
    try:
        said = json.loads(printed)
        if not isinstance(said, list):
            raise ValueError("no list of links")
        links = [one for one in said if isinstance(one, dict)]
        outside.own_addresses(session.name, links)
    except (QuietportError, ValueError, RecursionError):
        return [], "It could not tell its own addresses: what `ip` says there is not understood."
    return links, ""


def _public_side(name: str, listening: Iterable[int], links: list[Any], untold: str = "") -> PublicSide:
    """Connect from outside to the usual ports, and to those that something on the host listens at.

    `untold`: why addresses of its own are not among them; then it is not called closed. sshd counts
    connections without a login (PerSourcePenalties of sshd_config(5)): it is one an address.
    """
    try:
        settings = settings_for(name)
        numbers = {*parse_ports(WELL_KNOWN), settings.port, public_route(name).port, *listening}
        asked = ",".join(str(number) for number in sorted(numbers))
        targets = outside.addresses(name, links)
        seen = outside.look(name, targets, ports=asked, timeout=SCAN_TIMEOUT_S)
        side = outside.judge(settings, seen)
    except (*_TROUBLE, ValueError) as error:
        return PublicSide("unknown", reason=asking.why(name, error))
    if not untold:
        return side
    reason = f"{side.reason} {untold}".strip()
    return replace(side, state="open" if side.open else "unknown", reason=reason)


def text(rows: Sequence[Row]) -> str:
    """One table of all hosts, and below it what there is to say of those that need it."""
    table: list[Sequence[str]] = [("HOST", "STATE", "FAIL", "WARN", "REACHED BY", "PUBLIC SIDE")]
    table += [_cells(row) for row in rows]
    blocks = ["\n".join(lines) for row in rows if (lines := list(_block(row)))]
    return "\n\n".join(["\n".join(aligned(table)), *blocks])


def _cells(row: Row) -> tuple[str, ...]:
    statuses = [one.status for one in row.findings]
    # Without a report nobody has counted.
    counts = [str(statuses.count(kind)) if row.report else "-" for kind in ("FAIL", "WARN")]
    return (row.name, row.state, *counts, row.way or "-", _public_cell(row.public))


def _public_cell(public: PublicSide) -> str:
    if public.open:
        return f"open: {', '.join(dict.fromkeys(one.rpartition(':')[2] for one in public.open))}"
    if public.state == "unknown":
        return "not asked everywhere" if public.asked else "not asked"
    return public.state


def _block(row: Row) -> Iterator[str]:
    lines = [*([f"  {row.error}"] if row.error else []), *_told(row.findings)]
    if row.public.reason:
        lines.append(f"  public side: {row.public.reason}")
    if lines:
        yield f"{row.name}: {row.state}"
        yield from (printable(line) for line in lines)


def _told(findings: Iterable[Said]) -> Iterator[str]:
    for one in findings:
        yield f"  {one.status} {one.check}: {one.reason}"
        if one.next_step:
            yield f"       {one.next_step}"
