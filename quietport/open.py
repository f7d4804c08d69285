"""`quietport open`: sshd in public, to keys alone, now. For a provider's console, when nothing else works.

It needs no network, no tailscale and no converge. sshd listens on every address, ufw lets everybody at port
22, the address follower pauses, and all of that survives a reboot. A timer looks every minute: when the time
is over and the tailnet works, it closes again; while the tailnet does not work, the host stays open.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pwd
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from quietport import admission, commands, opened, sshd, sshd_follow
from quietport.errors import FINE, PROBLEM, USAGE, HostProgramError, printable
from quietport.guard import state
from quietport.hostfile import HostFileMissingError, host_settings, read_json, write_atomic
from quietport.net import TAILNET_INTERFACE
from quietport.opened import Opened
from quietport.rtnetlink import addresses_on
from quietport.sshd_apply import COMMAND_TIMEOUT_S, Apply, Failed, Host, Plan, to_the_end
from quietport.sshd_wait import Wanted, bindable
from quietport.ufw_rules import MARK, bare, is_ours, parse_added, shown, traffic, words_of
from quietport.unit_names import UNIT_FOLDER

RULE = f"allow {sshd.PORT}/tcp"
WHY = "opened by hand"
LOCK_TIMEOUT_S = 60.0
DEFAULT_S = 3600
LONGEST_S = 7 * 24 * 3600
UNIT = "quietport-close"
_HEADER = "# Made by `quietport open`, and taken away by `quietport close`.\n"
UNITS = {
    f"{UNIT_FOLDER}/{UNIT}.service": f"""{_HEADER}[Unit]
Description=quietport: close sshd again when its time is over and the tailnet works

[Service]
Type=oneshot
ExecStart=/usr/local/sbin/quietport close --when-due
# What it does it tells the journal itself.
StandardOutput=null
""",
    f"{UNIT_FOLDER}/{UNIT}.timer": f"""{_HEADER}[Unit]
Description=quietport: look every minute whether the host can be closed

[Timer]
OnActiveSec=60
OnUnitActiveSec=60
AccuracySec=10

[Install]
WantedBy=timers.target
""",
}
# For a firewall that does not do what ufw says. A boot takes it away, the timer puts it back.
COMMENT = f"{MARK}{WHY}"
_MARKED = ["-m", "comment", "--comment", COMMENT]
_DIRECT = ["INPUT", "-p", "tcp", "--dport", str(sshd.PORT), *_MARKED, "-j", "ACCEPT"]
_UNITS_OF_TIME = {"m": 60, "h": 3600, "d": 86400}

HOW_TO_GO_ON = f"""\
How to go on: correct that line, or put the file aside. Of the main file Debian keeps a copy:
  mv {sshd.MAIN} {sshd.MAIN}.broken
  cp /usr/share/openssh/sshd_config {sshd.MAIN}
Of {sshd.FOLDER}/NAME.conf there is none, and none is needed:
  mv {sshd.FOLDER}/NAME.conf {sshd.FOLDER}/NAME.conf.broken
Then `quietport open` again."""

Say = Callable[[str], None]


def seconds_of(text: str) -> int:
    """`1h`, `90m`, `1h30m`, `2d` in seconds. Raises ValueError for anything else."""
    parts = re.findall(r"(\d+)([mhd])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError("a time is written 30m, 1h, 1h30m or 2d")
    seconds = sum(int(number) * _UNITS_OF_TIME[unit] for number, unit in parts)
    if not 60 <= seconds <= LONGEST_S:
        raise ValueError("the time is a minute at least, and a week at most")
    return seconds


@dataclass(frozen=True)
class FirewallPlan:
    """What to do to an active ufw: rules of others to take away, and whether ours is to be put first."""

    replaced: tuple[str, ...] = ()
    prepend: bool = False


def plan_firewall(rules: Sequence[str]) -> FirewallPlan:
    """From the rules as `ufw show added` has them. One of others that says the same is left as it is."""
    about = traffic(RULE)
    same = [rule for rule in rules if bare(rule) == RULE]
    against = tuple(rule for rule in rules if traffic(rule) == about and bare(rule) != RULE)
    first = rules[0] if rules else ""
    return FirewallPlan(replaced=against, prepend=not same or (is_ours(same[0]) and bare(first) != RULE))


class Door:
    """Opens and closes one host. Callers hold the lock."""

    def __init__(
        self,
        host: Host,
        *,
        say: Say,
        clock: Callable[[], float] = time.time,
        addresses: Callable[[], tuple[str, ...]] = lambda: addresses_on(TAILNET_INTERFACE),
        can_bind: Callable[[Wanted], bool] = bindable,
        families: Callable[[], tuple[int, ...]] = admission.families,
        apply: Callable[..., Callable[[], bool]] = Apply,
    ) -> None:
        self._host = host
        self._heard: list[str] = []
        self._out = say
        self._clock = clock
        self._addresses = addresses
        self._can_bind = can_bind
        self._families = families
        self._apply = apply

    def _say(self, line: str) -> None:
        self._heard.append(line)
        self._out(line)

    # --- opening --------------------------------------------------------------------------------------

    def open(self, seconds: int) -> bool:
        """Open for `seconds` at least; True when everybody can knock. What is open already stays so."""
        before = opened.read(self._host.path)
        note = replace(before or self._new_note(), until=self._clock() + seconds, said="")
        self._folder()
        # First: whatever ends this half-way, something closes it. Without a note it ends itself.
        timed = self._start_timer()
        opened.write(note, self._host.path)
        try:
            done = self._sshd(sshd.public_listeners(ipv6=6 in self._families()))
        except (Failed, HostProgramError, OSError) as error:
            self._say(f"sshd: {error}")
            done = False
        if not done:
            if before is None:
                opened.forget(self._host.path)
                self._stop_timer()
            refused = any("refuses" in line for line in self._heard)
            for line in HOW_TO_GO_ON.splitlines() if refused else ["See `journalctl -u ssh`."]:
                self._say(line)
            return False
        self._look_for_keys()
        self._open_firewall(note)
        closed = self._closed_families()
        for family in closed:
            self._say(
                f"The firewall still keeps strangers from port {sshd.PORT} (IPv{family}): look at "
                f"`{admission.PROGRAMS[family]} -S`. `ufw disable` opens everything."
            )
        self._say(f"Open until {opened.at(note.until)} at least, and then until the tailnet works.")
        self._say("`quietport close` closes now, `quietport open --status` tells how it stands.")
        return not closed and timed

    def _new_note(self) -> Opened:
        try:
            text = (self._host.read(sshd.DROP_IN).data or b"").decode()
            public = text.startswith(sshd.OURS) and any(map(sshd.is_wildcard, sshd.listen_addresses(text)))
        except (Failed, ValueError):
            public = False
        since = datetime.fromtimestamp(self._clock(), UTC).strftime("%Y-%m-%d %H:%M UTC")
        return Opened(since=since, public_before=public)

    def _look_for_keys(self) -> None:
        user = self._users()[0]
        with suppress(KeyError, Failed):
            path = f"{pwd.getpwnam(user).pw_dir}/.ssh/authorized_keys"
            if not (self._host.read(path).data or b"").strip():
                self._say(f"There is no key in {path}: put yours there, or nobody gets in as {user}.")

    def _folder(self) -> None:
        self._host.path(str(opened.OPENED.parent)).mkdir(mode=0o755, parents=True, exist_ok=True)

    def _sshd(self, listeners: Sequence[sshd.Listener]) -> bool:
        """sshd listens there and nowhere else, to keys alone; True when it does. Raises Failed, OSError."""
        files = self._host.texts()
        users = self._users()
        drop_in = files.get(sshd.DROP_IN, "")
        if not drop_in.startswith(sshd.OURS):
            root = sshd.root_login(files, login_user=users[0])
            drop_in = sshd.render((), permit_root_login=root)
        wanted = sshd.wanted_files(files, sshd.with_public(drop_in, listeners))
        if wanted == files and self._host.ssh_listeners() == frozenset(listeners):
            return True
        changed: dict[str, tuple[str | None, str | None]] = {
            path: (_digest(files.get(path)), text)
            for path, text in wanted.items()
            if files.get(path) != text or path == sshd.DROP_IN
        }
        for path, line in sshd.neutralised(files, wanted):
            self._say(f"{path}: commented out with a mark, because it would stay active: {line}")
        plan = Plan(files=changed, mask=sshd.SOCKETS, listeners=frozenset(listeners), users=users)
        return self._apply(plan, self._host, say=self._say)()

    def _users(self) -> tuple[str, ...]:
        try:
            users = host_settings(self._host.path("/etc/quietport/host.json")).get("users")
        except HostProgramError:
            users = None
        return tuple(map(str, users)) if isinstance(users, list) and users else ("root",)

    # --- the firewall ---------------------------------------------------------------------------------

    def _ufw_active(self) -> bool:
        done = self._host.run(["ufw", "status"])
        return done.returncode == 0 and "Status: active" in done.stdout.splitlines()

    def _open_firewall(self, note: Opened) -> None:
        """Let everybody at the port; the rules that are replaced are noted before."""
        if self._ufw_active():
            plan = plan_firewall(parse_added(self._host.run(["ufw", "show", "added"]).stdout))
            if plan.replaced:
                replaced = tuple(dict.fromkeys((*note.replaced, *plan.replaced)))
                opened.write(replace(note, replaced=replaced), self._host.path)
            for rule in plan.replaced:
                self._say(f"firewall: taken away while the host is open: {rule}")
                self._tell(["ufw", "delete", *words_of(bare(rule))])
            if plan.prepend:
                # ufw does not move a rule it has.
                self._host.run(["ufw", "delete", *RULE.split()])
                self._tell(["ufw", "prepend", *words_of(shown(RULE, WHY))])
            self._say(f"firewall: {shown(RULE, WHY)}")
        self._keep_open()

    def _keep_open(self) -> None:
        """Where the kernel does not do what ufw says, or there is none, a rule goes before all others."""
        for family in self._closed_families():
            self._tell([admission.PROGRAMS[family], "-w", admission.LOCK_WAIT_S, "-I", *_DIRECT])

    def _closed_families(self) -> list[int]:
        return [
            family
            for family in self._families()
            if not admission.lets_strangers_in(self._filter(family), port=sshd.PORT)
        ]

    def _filter(self, family: int) -> str:
        """The filter table; of a host without the program, which has no rules, an open one."""
        done = self._host.run([admission.PROGRAMS[family], "-w", admission.LOCK_WAIT_S, "-S"])
        absent = done.returncode == 127 and commands.NOT_INSTALLED in done.stderr
        return "-P INPUT ACCEPT\n" if absent else done.stdout

    def _take_direct_rules(self) -> bool:
        for family in self._families():
            program = admission.PROGRAMS[family]
            while self._host.run([program, "-w", admission.LOCK_WAIT_S, "-C", *_DIRECT]).returncode == 0:
                if not self._tell([program, "-w", admission.LOCK_WAIT_S, "-D", *_DIRECT]):
                    return False
        return True

    def _nothing_left(self) -> None:
        """Without a note: a guard's rollback took it, and knows nothing of our own rules and our timer."""
        if self._take_direct_rules():
            self._stop_timer()

    def _close_firewall(self, note: Opened) -> bool:
        if not self._take_direct_rules():
            return False
        rules = parse_added(self._host.run(["ufw", "show", "added"]).stdout)
        done = True
        if shown(RULE, WHY) in rules:
            done = self._tell(["ufw", "delete", *RULE.split()])
        for rule in note.replaced:
            if rule not in rules:
                done = self._tell(["ufw", *words_of(rule)]) and done
        return done

    def _tell(self, argv: list[str]) -> bool:
        done = self._host.run(argv)
        if done.returncode != 0:
            complaint = commands.Done(done.returncode, done.stdout, done.stderr).complaint
            self._say(f"{' '.join(argv[:3])} failed: {printable(complaint)}")
        return done.returncode == 0

    # --- the timer ------------------------------------------------------------------------------------

    def _start_timer(self) -> bool:
        try:
            for path, text in UNITS.items():
                place = self._host.path(path)
                if not place.exists() or place.read_text() != text:
                    # On the disk when sshd moves: a power cut must not leave an empty unit.
                    write_atomic(place, text.encode(), mode=0o644)
            self._host.systemctl("daemon-reload")
            self._host.systemctl("enable", "--now", f"{UNIT}.timer")
        except (Failed, HostProgramError, OSError) as error:
            self._say(f"It will not close by itself ({error}): `quietport close` does, by hand.")
            return False
        return True

    def _stop_timer(self) -> None:
        if armed_by(self._host.path):
            # The rollback may put the note back; with none the timer ends itself when the guard is gone.
            return
        places = [self._host.path(path) for path in UNITS]
        if not any(place.exists() for place in places):
            return
        self._host.run(["systemctl", "disable", "--now", f"{UNIT}.timer"])
        for place in places:
            place.unlink(missing_ok=True)
        self._host.run(["systemctl", "daemon-reload"])

    # --- closing --------------------------------------------------------------------------------------

    def reasons(self) -> list[str]:
        """Why the host must not be closed now, a sentence each: nobody would get in."""
        found: list[str] = []
        addresses = self._addresses()
        if not addresses:
            found.append(f"No address is on {TAILNET_INTERFACE}.")
        state = self._tailscale_state()
        if state != "Running":
            found.append(f"tailscale is {state or 'not there, or does not answer'}, not Running.")
        missing = [address for address in addresses if not self._can_bind(Wanted(address))]
        if addresses and len(missing) == len(addresses):
            found.append(f"sshd could not listen on {', '.join(missing)}.")
        return found

    def _tailscale_state(self) -> str:
        done = self._host.run(["tailscale", "status", "--json", "--peers=false"])
        try:
            return str(json.loads(done.stdout)["BackendState"])
        except (ValueError, KeyError, TypeError):
            return ""

    def close(self, note: Opened | None, *, force: bool = False) -> bool:
        """Close, when the tailnet works or it is insisted; True when it is closed."""
        if note is None:
            self._nothing_left()
            self._say("The host is not open.")
            return True
        reasons = [] if note.public_before else self.reasons()
        if reasons and not force:
            self._say(f"It stays open, because nobody would get in: {' '.join(reasons)}")
            return False
        try:
            if not note.public_before and not self._sshd(sshd.wanted_listeners(self._addresses())):
                return False
        except (Failed, ValueError, OSError) as error:
            self._say(f"sshd: {error}")
            return False
        if not self._close_firewall(note) and not force:
            return False
        self.forget(note)
        if reasons:
            self._say(f"Closed, as you insist: {' '.join(reasons)} Only this console gets in now.")
        else:
            self._say("Closed: sshd is where it was before, and so is the firewall.")
        return True

    def forget(self, note: Opened | None) -> None:
        """Timer, pause, note and what was done to the firewall go; sshd is the caller's to put in order."""
        if note is not None:
            # A rule that says no to the port would have stopped who forgets it now.
            self._close_firewall(replace(note, replaced=()))
        self._stop_timer()
        opened.forget(self._host.path)

    def when_due(self, note: Opened | None) -> bool:
        """What the timer does. Says why it stays open once, not at every look."""
        if note is None:
            self._nothing_left()
            return True
        if self._clock() < note.until:
            self._keep_open()
            return True
        # Also with break-glass, whose networks may be far from who opened.
        reasons = self.reasons()
        if not reasons:
            return self.close(note)
        self._keep_open()
        sentence = " ".join(reasons)
        if sentence != note.said:
            self._say(f"The time is over, and the host stays open: {sentence}")
            opened.write(replace(note, said=sentence), self._host.path)
        return True

    def status(self, note: Opened | None) -> Iterator[str]:
        """How it stands, for people."""
        listeners = ", ".join(sorted(map(sshd.endpoint, self._host.ssh_listeners()))) or "nothing"
        if note is None:
            yield f"Not open. sshd listens on {listeners}."
            return
        yield f"Open: {note.sentence()}. sshd listens on {listeners}."
        reasons = self.reasons()
        if reasons:
            yield f"It would not close now: {' '.join(reasons)}"
        else:
            yield "It would close now: the tailnet works."
        for family in self._closed_families():
            yield f"The firewall keeps strangers from port {sshd.PORT} (IPv{family})."


def _digest(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def run(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a program to its end in the environment that messages are understood in; never raises."""
    try:
        done = commands.run(argv, timeout=COMMAND_TIMEOUT_S)
    except HostProgramError as error:
        return subprocess.CompletedProcess(list(argv), 127, "", str(error))
    return subprocess.CompletedProcess(list(argv), done.code, done.out, done.err)


def armed_by(place: Callable[[str], Path]) -> str:
    """Who has a guard armed on this host; "" when nobody has. It would undo what is opened now."""
    try:
        document = read_json(place(state.ARMED))
    except HostFileMissingError:
        return ""
    except HostProgramError:
        return "somebody"
    return str(document.get("by") or "somebody")


def waits(by: str) -> str:
    """What to do while a guard is armed, as sentences."""
    return (
        f"A change by {by} waits for its confirmation here. It undoes itself soon, or now by `quietport "
        "guard rollback`; do it again then."
    )


Hold = Callable[[float], AbstractContextManager[None]]


def opening(
    host: Host,
    seconds: int,
    *,
    force: bool,
    say: Say,
    hold: Hold = sshd_follow.hold,
    door: Door | None = None,
) -> int:
    """`quietport open` with the lock held; returns the exit code."""

    def refused() -> bool:
        by = "" if force else armed_by(host.path)
        if by:
            say(f"{waits(by)} `quietport open --force` does not wait, and is undone with it.")
        return bool(by)

    if refused():
        return PROBLEM
    try:
        with hold(LOCK_TIMEOUT_S):
            # Arming takes the same lock: a guard may be there now.
            if refused():
                return PROBLEM
            return FINE if (door or Door(host, say=say)).open(seconds) else PROBLEM
    except (HostProgramError, OSError) as error:
        say(str(error))
        return PROBLEM


def main(argv: list[str]) -> int:
    """Exit codes: 0 open (--status: told), 1 not open or not whole (the output says why), 2 usage."""
    parser = argparse.ArgumentParser(prog="quietport open", description=__doc__)
    parser.add_argument("--for", dest="time", default="1h", metavar="TIME", help="30m, 1h, 2d; default: 1h")
    parser.add_argument("--status", action="store_true", help="tell whether it is open, and would close")
    parser.add_argument("--force", action="store_true", help="also while a guarded change is under way")
    options = parser.parse_args(argv)
    try:
        seconds = seconds_of(options.time)
    except ValueError as error:
        parser.error(f"{error}.")
    if os.geteuid() != 0:
        parser.exit(USAGE, "quietport open: only root can do this.\n")
    host = Host(run=run)
    if options.status:
        for line in Door(host, say=print).status(opened.read()):
            print(printable(line))
        return FINE
    return to_the_end(lambda say: opening(host, seconds, force=options.force, say=say))
