"""sshd: no socket that could start it, and the one that runs answers where and whom it should."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quietport import admission, opened, sshd, sshd_apply, sshd_follow
from quietport.commands import output_of
from quietport.doctor.model import Check, Finding
from quietport.doctor.place import HERE, NOT_CONVERGED, QUICK_S, by_converge
from quietport.errors import HostProgramError
from quietport.hostfile import PUBLIC_SSHD
from quietport.times import SHOW_START, newest, properties, read_at, stale
from quietport.unit_names import UNIT_FOLDER

_SHOW_SOCKETS = ("systemctl", "show", "-p", "Names", "-p", "LoadState", "-p", "ActiveState", "--")
# What sshd refuses is told by its first lines; a whole file of them helps nobody.
_SAID = 300


# --- sockets ---


def look_at_sockets(declared: Mapping[str, Any]) -> list[Finding]:
    """The check `ssh-sockets`."""
    if not declared:
        return [NOT_CONVERGED]
    plain = [name for name in sshd.SOCKETS if "@." not in name]
    shown = output_of([*_SHOW_SOCKETS, *plain, "ssh@*.socket", "sshd@*.socket"], timeout=QUICK_S)
    templates = [name for name in sshd.SOCKETS if "@." in name]
    masked = {name for name in templates if _is_mask(Path(UNIT_FOLDER, name))}
    links = [link for link in sshd.SOCKET_LINKS if Path(link).is_symlink()]
    return judge_sockets(shown, masked, links, declared)


def _is_mask(path: Path) -> bool:
    """A link to /dev/null, or an empty file (systemd.unit(5))."""
    try:
        return str(path.readlink()) == "/dev/null"
    except OSError:
        return path.is_file() and path.stat().st_size == 0


def judge_sockets(
    shown: str, masked: Collection[str], links: Iterable[str], declared: Mapping[str, Any]
) -> list[Finding]:
    """Findings from what `systemctl show` says of the sockets, the `masked` templates, and the `links` by
    which ssh.service would want its socket."""
    blocks = [properties(block) for block in shown.split("\n\n")]
    units = {name: block for block in blocks for name in block.get("Names", "").split()}
    closed = {name for name, unit in units.items() if unit.get("LoadState") == "masked"} | set(masked)
    active = {name for name, unit in units.items() if unit.get("ActiveState") == "active"}
    pulled = list(links)
    found = []
    for name in sshd.SOCKETS:
        if name in closed:
            continue
        # Where it holds sshd's port, sshd has to take over: no single command does that.
        alone = name not in active and not pulled
        step = f"`systemctl mask {name}`" if alone else by_converge(declared)
        found.append(Finding("FAIL", f"{name} is not masked: it can start an sshd of its own.", step))
    for name in sorted(active):
        if name in sshd.SOCKETS and name not in closed:
            continue  # told above
        found.append(Finding("FAIL", f"{name} is active.", f"`systemctl stop {name}`"))
    if pulled and not found:
        step = f"`rm {' '.join(pulled)}`, `systemctl daemon-reload`"
        found.append(Finding("FAIL", "ssh.service requires a masked socket and will not start.", step))
    return found or [Finding("PASS", "Every socket of ssh is masked.")]


# --- sshd itself ---


@dataclass(frozen=True)
class Seen:
    """What the host shows of its sshd.

    `unit`: properties of ssh.service; `wanted`: where it must listen, None where that is nobody's to say, and
    `why`; `behind`: why its file is about to change; `listeners`: where it really listens; `stale`: it has
    not read its files; `effective`: (user, address, `sshd -T -C` of such a login); `refused`: what sshd says
    of its files.
    """

    unit: Mapping[str, str]
    wanted: frozenset[sshd.Listener] | None = None
    why: str = ""
    paused: bool = False
    behind: str = ""
    listeners: frozenset[sshd.Listener] = frozenset()
    stale: bool = False
    refused: str = ""
    effective: Sequence[tuple[str, str, Mapping[str, list[str]]]] = field(default_factory=tuple)


def look(declared: Mapping[str, Any]) -> list[Finding]:
    """The check `sshd`."""
    if not declared:
        return [NOT_CONVERGED]
    note = opened.read()
    if note is not None:
        return [Finding("FAIL", f"sshd was {note.sentence()}.", "`quietport close`")]
    return judge(seen(HERE.sshd_host(), declared), declared)


def seen(place: sshd_apply.Host, declared: Mapping[str, Any]) -> Seen:
    """Raises HostProgramError when it cannot be read."""
    asked = ("UnitFileState", "LoadState", "ActiveState", "ActiveEnterTimestamp", "StateChangeTimestamp")
    shown = place.run([*SHOW_START.split(), *(word for name in asked for word in ("-p", name)), sshd.UNIT])
    unit = properties(shown.stdout)
    if unit.get("ActiveState") != "active":
        return Seen(unit)
    decision = sshd_follow.look(place).decision
    wanted, why = _wanted(decision, declared)
    pid = int(unit.get("MainPID") or 0)
    refused, effective = _effective(place, [str(user) for user in declared.get("users") or []])
    return Seen(
        unit=unit,
        wanted=wanted,
        why=why,
        paused=bool(sshd_follow.paused(place.path(str(sshd_follow.PAUSED)))),
        behind=decision.sentence if decision.text is not None else "",
        listeners=place.listeners([pid] if pid else []),
        stale=stale(read_at(unit), newest(_times(place), now=time.time())),
        refused=refused,
        effective=effective,
    )


def _wanted(
    decision: sshd_follow.Decision, declared: Mapping[str, Any]
) -> tuple[frozenset[sshd.Listener] | None, str]:
    """Where sshd must listen, and why that is not known."""
    if declared.get(PUBLIC_SSHD) is True:
        return frozenset(sshd.public_listeners(ipv6=6 in admission.families())), ""
    return decision.listeners, "" if decision.listeners is not None else decision.sentence


def _times(place: sshd_apply.Host) -> str:
    """When sshd's files last changed, in seconds since the epoch, one a line."""
    folder = place.path(sshd.FOLDER)
    files = [place.path(sshd.MAIN), folder, *folder.glob("*.conf")]
    return "\n".join(f"{file.stat().st_mtime_ns / 1e9:.9f}" for file in files if file.exists())


def _effective(
    place: sshd_apply.Host, users: Sequence[str]
) -> tuple[str, list[tuple[str, str, Mapping[str, list[str]]]]]:
    """What sshd refuses of its files, and what it makes of them for logins of `users` and root."""
    try:
        files = place.texts()
    except sshd_apply.Failed as error:
        raise HostProgramError(f"{error}.") from error
    asked = [(user, source) for user in dict.fromkeys((*users, "root")) for source in sshd.ASKED_FROM]
    known = {Path(path).name for path in files}
    others = [file for file in place.path(sshd.FOLDER).glob("*.conf") if file.name not in known]
    if not (others or may_differ(files)):
        asked = asked[:1]
    found: list[tuple[str, str, Mapping[str, list[str]]]] = []
    for user, source in asked:
        done = place.sshd("-T", "-C", f"user={user},host={source},addr={source}")
        if done.returncode != 0:
            return " ".join(done.stderr.split())[:_SAID] or "it said nothing", []
        found.append((user, source, sshd.parse_effective(done.stdout)))
    return "", found


def may_differ(files: Mapping[str, str]) -> bool:
    """Whether sshd may treat one login otherwise than another: a Match block, or files not looked into."""
    return any(
        line.keyword == "match"
        or (line.keyword == "include" and not all(_is_known(pattern) for pattern in line.args))
        for text_path, text in files.items()
        for line in sshd.parse(text_path, text)
    )


def _is_known(pattern: str) -> bool:
    """Whether an Include names files of the folder that is read anyway, by *.conf or one by one."""
    full = Path("/etc/ssh") / pattern
    return str(full.parent) == sshd.FOLDER and full.suffix == ".conf"


def judge(now: Seen, declared: Mapping[str, Any]) -> list[Finding]:
    """What is wrong, each with its next step."""
    if down := _down(now.unit):
        return [down]
    found = []
    if now.unit.get("UnitFileState") != "enabled":
        found.append(
            Finding("FAIL", f"{sshd.UNIT} is not started at boot.", f"`systemctl enable {sshd.UNIT}`")
        )
    if now.refused:
        step = f"Correct that line, until `{sshd_apply.SSHD} -t` is content. {by_converge(declared)}"
        return [*found, Finding("FAIL", f"sshd refuses its configuration: {now.refused}", step)]
    found += _keys(now, declared)
    found += _places(now, declared)
    if now.stale and not found:
        why = "sshd runs with an older configuration than its files hold."
        found.append(Finding("FAIL", why, f"`systemctl reload {sshd.UNIT}`"))
    if found:
        return found
    where = ", ".join(sorted(map(sshd.endpoint, now.listeners)))
    return [Finding("PASS", f"sshd answers on {where}, to keys alone.")]


def _down(unit: Mapping[str, str]) -> Finding | None:
    state = unit.get("ActiveState", "unknown")
    if state == "active":
        return None
    if unit.get("LoadState") == "masked":
        step = f"`systemctl unmask {sshd.UNIT}`, `systemctl enable --now {sshd.UNIT}`"
        return Finding("FAIL", f"{sshd.UNIT} is masked: nobody can log in.", step)
    if state in ("activating", "reloading"):
        why = f"{sshd.UNIT} is {state}: it waits for the tailnet's addresses, or has only just been started."
        return Finding("FAIL", why, f"`systemctl start tailscaled.service {sshd.UNIT}`")
    return Finding("FAIL", f"{sshd.UNIT} is {state}: nobody can log in.", f"`systemctl restart {sshd.UNIT}`")


def _keys(now: Seen, declared: Mapping[str, Any]) -> list[Finding]:
    """Who gets in without a key, by what; each keyword once, with one login as the example."""
    told: dict[str, tuple[str, str]] = {}
    for user, source, effective in now.effective:
        for phrase in sshd.not_keys_only(effective):
            told.setdefault(phrase, (user, source))
    return [
        Finding(
            "FAIL", f"sshd does not take keys alone: {phrase} ({user} from {source}).", by_converge(declared)
        )
        for phrase, (user, source) in told.items()
    ]


def _places(now: Seen, declared: Mapping[str, Any]) -> list[Finding]:
    if now.wanted is None:
        if now.paused:
            step = f"`rm {sshd_follow.PAUSED}`"
            return [Finding("WARN", f"sshd does not follow the tailnet's addresses. {now.why}", step)]
        return [
            Finding("FAIL", f"It is not known where sshd should listen. {now.why}", by_converge(declared))
        ]
    if now.behind and declared.get(PUBLIC_SSHD) is not True:
        return [Finding("FAIL", now.behind, "`quietport sshd-follow --once`")]
    if now.listeners == now.wanted:
        return []
    is_at, wanted = (
        ", ".join(sorted(map(sshd.endpoint, some))) or "nothing" for some in (now.listeners, now.wanted)
    )
    why = f"sshd listens on {is_at}, not on {wanted}."
    # What is missing the follower brings; what is too much stands in a file of somebody else's.
    follows = now.wanted - now.listeners and declared.get(PUBLIC_SSHD) is not True
    named = {one for _, _, effective in now.effective for one in sshd.effective_listeners(effective)}
    if follows and {sshd.endpoint(one) for one in now.wanted} == named:
        return [Finding("FAIL", why, "`quietport sshd-follow --once`")]
    return [Finding("FAIL", why, by_converge(declared))]


CHECKS = (Check("ssh-sockets", look_at_sockets), Check("sshd", look))
