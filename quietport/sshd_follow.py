"""`quietport sshd-follow`: keep sshd on the addresses that tailscale0 has, whatever happens to them.

A node that is registered anew comes back with another address; sshd stays on the old one, where nobody
reaches it. Here the ListenAddress lines of our drop-in follow: the new file is checked by `sshd -t` before it
takes the old one's place, sshd reloads (no session ends), and what it really listens on is read back.

An outage is no reason to move: while the addresses are gone sshd keeps its sockets, and they work again when
the addresses return. Only when none has been there for a minute does sshd get 127.0.0.1, never the public.
What is not ours is left alone: no drop-in or somebody else's, a wildcard in it (break-glass), a pause.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from quietport import guardlock, sshd, sshd_apply
from quietport.errors import FINE, PROBLEM, USAGE, HostProgramError, printable
from quietport.hostfile import HostFileError, HostFileMissingError, read_bytes
from quietport.net import TAILNET_INTERFACE, parse_address
from quietport.rtnetlink import Changes, addresses_on

PAUSED = Path("/etc/quietport/follow-paused")
LOOK_S = 30.0
# tailscaled sets its addresses one after the other, and takes them away the same way.
SETTLE_S = 1.5
ABSENT_S = 60.0
LOCK_TIMEOUT_S = 120.0
LISTEN_TIMEOUT_S = 15.0
# A sshd that is just starting has not bound its addresses; seen twice, it is not just starting.
TWICE_S = 2.0
FIRST_RETRY_S = 5.0
LAST_RETRY_S = 600.0
_ON_ITS_WAY = ("activating", "reloading", "deactivating")


@dataclass(frozen=True)
class Decision:
    """What is to be done about the drop-in.

    `listeners`: where sshd must listen; None when that is not ours to say. `text`: what the drop-in must hold
    and does not; None when nothing is to be written. `sentence`: why, for the journal.
    """

    sentence: str
    listeners: frozenset[sshd.Listener] | None = None
    text: str | None = None


def decide(drop_in: str | None, addresses: Iterable[str], *, paused: str = "") -> Decision:
    """The decision, from the drop-in (None: no such file), the addresses on tailscale0, and why not to."""
    known = tuple(addresses)
    if drop_in is None:
        return Decision(f"There is no {sshd.DROP_IN}: nothing to follow.")
    if not drop_in.startswith(sshd.OURS):
        return Decision(f"{sshd.DROP_IN} was not written by quietport: left alone.")
    if paused:
        return Decision(f"Paused ({PAUSED}): {paused}")
    try:
        named = sshd.listen_addresses(drop_in)
    except ValueError as error:
        return Decision(f"A ListenAddress in {sshd.DROP_IN} is none of ours ({error}): left alone.")
    if any(_is_wildcard(address) for address in named):
        return Decision(f"{sshd.DROP_IN} opens sshd on every address (break-glass): left alone.")
    usable = [address for address in known if not _is_wildcard(address)]
    text = sshd.with_addresses(drop_in, usable)
    listeners = frozenset(sshd.wanted_listeners(usable))
    here = f"{TAILNET_INTERFACE} has {', '.join(usable) or 'no address'}"
    if text == drop_in:
        return Decision(f"{here}; sshd's drop-in says so.", listeners)
    before = ", ".join(named) or "no address"
    after = ", ".join(address for address, _ in sorted(listeners, key=_order))
    return Decision(f"{here}; sshd's drop-in names {before} and gets {after}.", listeners, text)


def _is_wildcard(address: str) -> bool:
    return parse_address(address).is_unspecified


def _order(listener: sshd.Listener) -> tuple[bool, str]:
    return ":" in listener[0], listener[0]


def paused(path: Path = PAUSED, *, clock: Callable[[], float] = time.time) -> str:
    """Why nothing is to be followed now; "" when nobody says so.

    The file is JSON: `why`, a sentence, and `until`, seconds since the epoch or null (until it is removed).
    One that cannot be read pauses too: somebody wanted it, and has the host in hand.
    """
    try:
        document = json.loads(read_bytes(path))
        why, until = str(document.get("why") or "no reason given"), document.get("until")
        if until is not None and clock() >= float(until):
            return ""
    except HostFileMissingError:
        return ""
    except HostFileError as error:
        return str(error)
    except (ValueError, TypeError, AttributeError):
        return "the file cannot be read; remove it to go on."
    return printable(why)


class Steadiness:
    """How long the same addresses have been there."""

    def __init__(self) -> None:
        self._addresses: tuple[str, ...] | None = None
        self._since = 0.0

    def wait(self, addresses: tuple[str, ...], now: float) -> float:
        """Seconds until `addresses` are believed, if they stay; 0 when they are."""
        if addresses != self._addresses:
            self._addresses, self._since = addresses, now
        return max(0.0, self._since + (SETTLE_S if addresses else ABSENT_S) - now)


@dataclass(frozen=True)
class Seen:
    """One look at the host."""

    addresses: tuple[str, ...]
    decision: Decision


Hold = Callable[[float], AbstractContextManager[None]]


@contextmanager
def hold(timeout: float) -> Iterator[None]:
    """Nobody else changes how the host is reached: no guard's step, no rollback, no sshd-apply.

    Raises HostProgramError after `timeout` seconds. In that order everywhere: a guard's step runs sshd-apply.
    """
    with guardlock.hold(timeout=timeout):
        try:
            with sshd_apply.only_one(timeout=timeout):
                yield
        except sshd_apply.Failed as error:
            raise HostProgramError(f"{error}.") from error


def look(host: sshd_apply.Host, addresses: Iterable[str] | None = None) -> Seen:
    """What is to be done now. Raises HostProgramError when the host cannot be read."""
    known = tuple(addresses_on(TAILNET_INTERFACE) if addresses is None else addresses)
    try:
        saved = host.read(sshd.DROP_IN)
        text = None if saved.data is None else saved.data.decode()
    except (sshd_apply.Failed, UnicodeDecodeError) as error:
        return Seen(known, Decision(f"{sshd.DROP_IN} is none of ours ({error}): left alone."))
    if text is not None and (saved.uid != os.geteuid() or saved.mode & 0o022):
        return Seen(known, Decision(f"{sshd.DROP_IN} can be written by others than root: left alone."))
    return Seen(known, decide(text, known, paused=paused(host.path(str(PAUSED)))))


def place(host: sshd_apply.Host, decision: Decision) -> None:
    """Write the drop-in of `decision`, once sshd has said that it would listen there and is content.

    For callers that hold the lock; sshd is not told. Raises HostProgramError, and has then changed nothing.
    """
    if decision.text is None or decision.listeners is None:
        return
    try:
        with sshd_apply.candidate(host, {sshd.DROP_IN: decision.text}) as main:
            done = host.sshd("-t", "-f", str(main))
            if done.returncode != 0:
                said = _one_line(done.stderr).replace(str(main.parent), "/etc/ssh")
                raise HostProgramError(f"sshd refuses its configuration, nothing was changed: {said}")
            told = _effective(host, "-f", str(main))
        missing = {sshd.endpoint(listener) for listener in decision.listeners} - told
        if missing:
            raise HostProgramError(
                f"sshd would not listen on {', '.join(sorted(missing))} but on {', '.join(sorted(told))}: it "
                f"does not read {sshd.DROP_IN}. Nothing was changed; run the converge."
            )
        saved = replace(host.read(sshd.DROP_IN), data=decision.text.encode())
        host.write(sshd.DROP_IN, saved)
    except (sshd_apply.Failed, OSError) as error:
        raise HostProgramError(f"{sshd.DROP_IN} cannot be written: {error}.") from error


def _effective(host: sshd_apply.Host, *options: str) -> set[str]:
    done = host.sshd("-T", *options)
    if done.returncode != 0:
        raise HostProgramError(f"sshd refuses its configuration: {_one_line(done.stderr)}")
    return sshd.effective_listeners(sshd.parse_effective(done.stdout))


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))[:500] or "it said nothing"


class Follower:
    """Looks, and acts on what it sees; remembers what it said and what did not work."""

    def __init__(
        self,
        host: sshd_apply.Host,
        *,
        say: Callable[[str], None],
        quiet: bool = False,
        addresses: Callable[[], tuple[str, ...]] = lambda: addresses_on(TAILNET_INTERFACE),
        hold: Hold = hold,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._host = host
        self._out = say
        # Nothing is said while there is nothing to do: a timer would say it every time.
        self._quiet = quiet
        self._addresses = addresses
        self._hold = hold
        self._clock = clock
        self._sleep = sleep
        self._steady = Steadiness()
        self._said: str | None = None
        self._wrong_since: float | None = None
        self._checked: tuple[Seen, float] | None = None
        self._retry_s = 0.0
        self._not_before = 0.0
        self._failed_at: Seen | None = None
        self._seen: Seen | None = None
        # Whether the last look ended with nothing left to do.
        self.content = False

    def look(self) -> float:
        """Look once, act when that is due; returns in how many seconds to look again.

        What goes wrong on the host is said, never raised.
        """
        self.content = False
        self._seen = None
        try:
            self._seen = look(self._host, self._addresses())
            return min(LOOK_S, self._judge(self._seen, self._clock()))
        except HostProgramError as error:
            return self._failed(self._seen, str(error))

    def _judge(self, seen: Seen, now: float) -> float:
        patience = self._steady.wait(seen.addresses, now)
        if seen != self._failed_at:
            self._retry_s = self._not_before = 0.0
            self._failed_at = None
        if seen.decision.text is None:
            if self._retry_s == 0 and not self._quiet:
                self._say(seen.decision.sentence)
            if seen.decision.listeners is None:
                self.content = True
                return LOOK_S
            return self._check_sshd(seen, now)
        if patience > 0 or now < self._not_before:
            return max(patience, self._not_before - now)
        return self._act(seen, write=True)

    def _check_sshd(self, seen: Seen, now: float) -> float:
        """sshd listens where the file says, or is told to read it again."""
        if self._checked is not None and self._checked[0] == seen and now < self._checked[1]:
            return self._checked[1] - now
        listeners = seen.decision.listeners or frozenset()
        state, wrong = self._state(listeners)
        if not wrong:
            self._wrong_since = None
            self._retry_s = self._not_before = 0.0
            self.content = True
            if state in _ON_ITS_WAY:
                return TWICE_S
            self._checked = (seen, now + LOOK_S)
            return LOOK_S
        self._checked = None
        if self._wrong_since is None:
            self._wrong_since = now
        wait = max(self._wrong_since + TWICE_S, self._not_before) - now
        return wait if wait > 0 else self._act(seen, write=False)

    def _state(self, wanted: frozenset[sshd.Listener]) -> tuple[str, bool]:
        """State of ssh.service, and whether it failed or runs with other addresses than its files name."""
        state, actual = self._running()
        if state != "active" or actual == wanted:
            # Stopped by somebody, or just starting: it reads the file by itself when it starts.
            return state, state == "failed"
        if wanted - actual:
            return state, True
        # What others made it listen on besides is theirs, as long as it is in its files.
        return state, bool({sshd.endpoint(each) for each in actual} - _effective(self._host))

    def _running(self) -> tuple[str, frozenset[sshd.Listener]]:
        shown = self._host.show(sshd.UNIT, "ActiveState", "MainPID")
        pid = int(shown.get("MainPID") or 0)
        return shown.get("ActiveState", ""), self._host.listeners([pid] if pid else [])

    def _act(self, seen: Seen, *, write: bool) -> float:
        with self._hold(LOCK_TIMEOUT_S):
            # Whoever held the lock may have done it, or undone it.
            if look(self._host, self._addresses()) != seen:
                return SETTLE_S
            if not write and not self._state(seen.decision.listeners or frozenset())[1]:
                # It was in the middle of a restart of theirs: a reload would close its listeners once more.
                self._wrong_since = None
                return SETTLE_S
            if write:
                try:
                    place(self._host, seen.decision)
                except HostProgramError as error:
                    return self._failed(seen, str(error))
                self._say(seen.decision.sentence)
            problem = self._renew(seen.decision.listeners or frozenset())
        self._wrong_since = None
        # The file is right by now: what is judged next is this.
        after = look(self._host, seen.addresses)
        if problem:
            return self._failed(after, problem)
        self._said = after.decision.sentence
        self.content = True
        return TWICE_S

    def _renew(self, wanted: frozenset[sshd.Listener]) -> str:
        """sshd reads its files again; "" or what went wrong."""
        where = ", ".join(sorted(map(sshd.endpoint, wanted)))
        state, _ = self._running()
        if state not in ("active", "reloading", "failed"):
            self._say(f"sshd is {state or 'unknown to systemd'}: it takes {where} when it starts.")
            return ""
        done = self._host.sshd("-t")
        if done.returncode != 0:
            return f"sshd refuses its configuration and is left as it runs: {_one_line(done.stderr)}"
        complaint = ""
        # A reload keeps the process; where it does not do, a restart: sessions live on (KillMode=process).
        for verb in ("restart",) if state == "failed" else ("reload", "restart"):
            if verb == "restart" and wanted & self._running()[1]:
                break  # it answers on one of them, and a restart may be held back by the other
            try:
                self._host.systemctl(verb, sshd.UNIT)
            except sshd_apply.Failed as error:
                complaint = f" ({error})"
            else:
                if self._comes_right(wanted):
                    self._say(f"sshd was told to {verb}: it answers on {where}.")
                    return ""
        seen = ", ".join(sorted(map(sshd.endpoint, self._running()[1]))) or "nothing"
        return f"sshd listens on {seen}, not on {where}{complaint}: see `journalctl -u ssh`."

    def _comes_right(self, wanted: frozenset[sshd.Listener]) -> bool:
        deadline = self._clock() + LISTEN_TIMEOUT_S
        while True:
            state, wrong = self._state(wanted)
            if state == "active" and not wrong:
                return True
            if self._clock() >= deadline:
                return False
            self._sleep(0.2)

    def _failed(self, seen: Seen | None, sentence: str) -> float:
        """Say it, and do not try the same again at once."""
        self._say(sentence)
        self._failed_at = seen
        self._checked = None
        self._retry_s = min(LAST_RETRY_S, max(FIRST_RETRY_S, self._retry_s * 2))
        self._not_before = self._clock() + self._retry_s
        return min(self._retry_s, LOOK_S)

    def _say(self, sentence: str) -> None:
        if sentence != self._said:
            self._said = sentence
            self._out(sentence)


def watch(follower: Follower, *, say: Callable[[str], None]) -> int:
    """Follow until the program's own file is replaced; systemd then starts the new one."""
    program = _identity()
    changes = Changes()
    while True:
        pause = follower.look()
        if _identity() != program:
            say("The program was replaced: starting anew.")
            return FINE
        changes.wait(pause)


def _identity() -> tuple[int, int, int] | None:
    """Which file this program runs from: one that was replaced can load nothing more of itself."""
    try:
        status = Path(sys.argv[0]).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def once(
    follower: Follower,
    *,
    timeout: float = 2 * ABSENT_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Look until there is nothing left to do, at most `timeout` seconds."""
    deadline = clock() + timeout
    while True:
        pause = follower.look()
        if follower.content:
            return FINE
        if clock() + pause > deadline:
            return PROBLEM
        sleep(pause)


def main(argv: list[str]) -> int:
    """Exit codes: 0 nothing is left to do (`--watch`: the program was replaced), 1 sshd does not follow."""
    parser = argparse.ArgumentParser(prog="quietport sshd-follow", description=__doc__)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--watch", action="store_true", help="follow for ever (a service)")
    how.add_argument("--once", action="store_true", help="bring sshd up to date, and end (a timer)")
    options = parser.parse_args(argv)
    if os.geteuid() != 0:
        print("quietport sshd-follow: only root can do this.", file=sys.stderr)
        return USAGE
    follower = Follower(sshd_apply.Host(), say=_say, quiet=options.once and not sys.stdout.isatty())
    return watch(follower, say=_say) if options.watch else once(follower)


def _say(sentence: str) -> None:
    print(printable(sentence), flush=True)
