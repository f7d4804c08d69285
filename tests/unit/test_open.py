"""open and close: public when nothing else works, and closed again only when the tailnet does."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quietport import admission, opened, sshd, sshd_follow, sshd_wait, survey
from quietport import open as opening
from quietport.close import closing
from quietport.errors import HostProgramError
from quietport.guard.state import ARMED
from quietport.open import RULE, UNITS, WHY, Door, plan_firewall, seconds_of
from quietport.opened import OPENED, Opened
from quietport.sshd_apply import Host
from quietport.ufw_rules import bare, parse_added, shown

MAIN = "Include /etc/ssh/sshd_config.d/*.conf\n"
TAILNET = ("100.64.0.1",)
OURS = shown(RULE, WHY)
TAILNET_RULE = "allow in on tailscale0 comment 'quietport: the tailnet may come in'"
PUBLIC = frozenset(sshd.public_listeners())
CLOSED = frozenset({("100.64.0.1", 22)})
HOUR = 3600


class Machine(Host):
    """A host of files, with systemctl, sshd, ufw, iptables and tailscale as they would answer."""

    def __init__(self, root: Path) -> None:
        super().__init__(root=root, run=self._run)
        self.ran: list[str] = []
        self.fails: set[str] = set()
        self.absent: set[str] = set()
        self.ufw = [TAILNET_RULE]
        self.ufw_active = True
        self.direct = {"iptables": 0, "ip6tables": 0}
        self.extra = ""
        self.state = "Running"
        self.addresses: tuple[str, ...] = TAILNET
        self.bindable = True
        self.timer = False
        self.listening = CLOSED
        self.now = 1_800_000_000.0
        self.said: list[str] = []
        self.held = False
        self.put(sshd.MAIN, MAIN)
        self.put(sshd.DROP_IN, sshd.render(TAILNET))
        (root / "etc/systemd/system").mkdir(parents=True)
        for unit in sshd.SOCKETS:
            (root / "etc/systemd/system" / unit).symlink_to("/dev/null")

    def put(self, path: str, text: str) -> None:
        place = self.path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        place.chmod(0o644)

    def text(self, path: str | Path) -> str | None:
        place = self.path(str(path))
        return place.read_text() if place.exists() else None

    def ssh_listeners(self) -> frozenset[sshd.Listener]:
        return self.listening

    def door(self) -> Door:
        return Door(
            self,
            say=self.said.append,
            clock=lambda: self.now,
            addresses=lambda: self.addresses,
            can_bind=lambda wanted: self.bindable,
            families=lambda: (4, 6),
        )

    @contextmanager
    def hold(self, timeout: float) -> Iterator[None]:
        if self.held:
            raise HostProgramError("Another change is under way.")
        yield

    def open(self, seconds: int = HOUR, *, force: bool = False) -> int:
        return opening.opening(
            self, seconds, force=force, say=self.said.append, hold=self.hold, door=self.door()
        )

    def close(self, **how: bool) -> int:
        return closing(self, say=self.said.append, hold=self.hold, door=self.door(), **how)

    def note(self) -> Opened | None:
        return opened.read(self.path)

    @property
    def words(self) -> str:
        return "\n".join(self.said)

    # --- programs -------------------------------------------------------------------------------------

    def _run(self, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        line = " ".join(argv)
        self.ran.append(line)
        if Path(argv[0]).name in self.absent:
            return subprocess.CompletedProcess(list(argv), 127, "", f"{argv[0]} is not installed.")
        if any(line.startswith(prefix) for prefix in self.fails):
            return subprocess.CompletedProcess(list(argv), 1, "", "line 7: Bad configuration option: Bogus")
        code, out = getattr(self, f"_{Path(argv[0]).name}")(list(argv))
        return subprocess.CompletedProcess(list(argv), code, out, "")

    def _systemctl(self, argv: list[str]) -> tuple[int, str]:
        verb, unit = argv[1], argv[-1]
        if verb == "show":
            masked = unit in sshd.SOCKETS
            state = "" if masked else "enabled"
            return (
                0,
                f"UnitFileState={state}\nActiveState=inactive\nLoadState={('loaded', 'masked')[masked]}\n",
            )
        if verb == "is-enabled":
            return 0, "masked"
        if unit == "quietport-close.timer":
            self.timer = verb == "enable"
        if verb == "restart":
            self.listening = where(self.text(sshd.DROP_IN) or "")
        return 0, ""

    def _sshd(self, argv: list[str]) -> tuple[int, str]:
        folder = Path(argv[argv.index("-f") + 1]).parent if "-f" in argv else self.path("/etc/ssh")
        text = (folder / "sshd_config.d/00-quietport.conf").read_text()
        lines = [f"listenaddress {sshd.endpoint(one)}" for one in sorted(where(text))]
        policy = (
            "passwordauthentication no\nkbdinteractiveauthentication no\nauthenticationmethods publickey\n"
        )
        return 0, policy + "pubkeyauthentication yes\n" + "\n".join(lines)

    def _ufw(self, argv: list[str]) -> tuple[int, str]:
        words = argv[1:]
        if words == ["status"]:
            return 0, f"Status: {'active' if self.ufw_active else 'inactive'}\n"
        if words == ["show", "added"]:
            return 0, "Added user rules:\n" + "".join(f"ufw {rule}\n" for rule in self.ufw)
        if words[0] == "delete":
            self.ufw = [rule for rule in self.ufw if bare(rule) != " ".join(words[1:])]
            return 0, ""
        rule = " ".join(words[1:] if words[0] == "prepend" else words)
        rule = f"{bare(rule.replace(' comment ', chr(0)))}".replace("\0", " comment '") + "'" * (
            " comment " in rule
        )
        self.ufw = [rule, *self.ufw] if words[0] == "prepend" else [*self.ufw, rule]
        return 0, ""

    def _iptables(self, argv: list[str]) -> tuple[int, str]:
        name = Path(argv[0]).name
        if "-S" in argv:
            return 0, self.filter(name)
        if "-C" in argv:
            return (0 if self.direct[name] else 1), ""
        self.direct[name] += 1 if "-I" in argv else -1
        return 0, ""

    _ip6tables = _iptables

    def _tailscale(self, argv: list[str]) -> tuple[int, str]:
        return 0, json.dumps({"BackendState": self.state})

    def filter(self, name: str) -> str:
        if not self.ufw_active and not self.direct[name] and not self.extra:
            return "-P INPUT ACCEPT\n"
        policy = "DROP" if self.ufw_active else "ACCEPT"
        direct = "-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT\n" * self.direct[name]
        user = "".join(
            f"-A ufw-user-input -p tcp --dport 22 -j {('DROP', 'ACCEPT')[rule.startswith('allow')]}\n"
            for rule in self.ufw
            if bare(rule).endswith(" 22/tcp")
        )
        return f"-P INPUT {policy}\n-N ufw-user-input\n{direct}{self.extra}-A INPUT -j ufw-user-input\n{user}"


def where(drop_in: str) -> frozenset[sshd.Listener]:
    return frozenset((address, 22) for address in sshd.listen_addresses(drop_in))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr("quietport.sshd_apply.LISTEN_TIMEOUT_S", 0)
    monkeypatch.setattr("quietport.sshd_apply.login_users", list)
    return Machine(tmp_path)


def state(machine: Machine) -> tuple[Any, ...]:
    """All that opening changes."""
    return (
        *(machine.text(sshd.DROP_IN), machine.listening, tuple(machine.ufw), dict(machine.direct)),
        *(machine.timer, machine.text(OPENED), machine.text(sshd_follow.PAUSED)),
        *(machine.text(path) for path in UNITS),
    )


def is_open(machine: Machine) -> bool:
    return (
        machine.listening == PUBLIC
        and machine.timer
        and machine.note() is not None
        and sshd_follow.paused(machine.path(str(sshd_follow.PAUSED))) != ""
        and all(admission.lets_strangers_in(machine.filter(name), port=22) for name in machine.direct)
    )


# --- opening ------------------------------------------------------------------------------------------


def test_open_and_close_again(machine: Machine) -> None:
    before = state(machine)
    assert machine.open() == 0, machine.words
    assert is_open(machine)
    assert machine.ufw == [OURS, TAILNET_RULE]
    assert all(machine.text(path) == text for path, text in UNITS.items())
    assert machine.text(sshd.DROP_IN) == sshd.render((), public=sshd.public_listeners())
    assert "Open until 2027-01-15 09:00 UTC at least, and then until the tailnet works." in machine.words
    assert machine.close() == 0
    assert state(machine) == before


def test_a_second_time_only_the_end_is_later(machine: Machine) -> None:
    machine.open()
    first, restarts = state(machine), machine.ran.count("systemctl restart ssh.service")
    since = machine.note()
    machine.now += 600
    assert machine.open() == 0
    again = machine.note()
    assert since is not None
    assert again is not None
    assert (again.since, again.until) == (since.since, since.until + 600)
    assert machine.ran.count("systemctl restart ssh.service") == restarts
    same = [at for at, part in enumerate(state(machine)) if part == first[at]]
    assert len(same) == len(first) - 1


def test_it_needs_neither_tailscale_nor_ufw_nor_a_converge(machine: Machine) -> None:
    machine.absent = {"tailscale", "ufw", "iptables", "ip6tables"}
    machine.addresses = ()
    machine.path(sshd.DROP_IN).unlink()
    machine.put(sshd.MAIN, f"ListenAddress 10.0.0.5\nPasswordAuthentication yes\n{MAIN}")
    assert machine.open() == 0, machine.words
    assert machine.listening == PUBLIC
    text = machine.text(sshd.MAIN) or ""
    assert "# quietport: was: ListenAddress 10.0.0.5" in text
    assert "PasswordAuthentication no\n" in (machine.text(sshd.DROP_IN) or "")
    assert "commented out with a mark, because it would stay active: ListenAddress 10.0.0.5" in machine.words
    machine.now += 2 * HOUR
    assert machine.close(when_due=True) == 0
    assert machine.note() is not None, "nobody would get in"


def test_what_sshd_says_of_a_broken_file_is_told_with_the_way_on(machine: Machine) -> None:
    before = state(machine)
    machine.fails = {"/usr/sbin/sshd -t"}
    assert machine.open() == 1
    assert "line 7: Bad configuration option: Bogus" in machine.words
    assert "cp /usr/share/openssh/sshd_config /etc/ssh/sshd_config" in machine.words
    assert state(machine) == before
    machine.fails = set()
    assert machine.open() == 0


def test_an_sshd_that_does_not_come_up_leaves_all_as_it_was(machine: Machine) -> None:
    before = state(machine)
    machine.fails = {"systemctl restart"}
    assert machine.open() == 1
    machine.fails = set()
    assert state(machine) == before
    assert "journalctl" in machine.words
    assert "cp /usr/share" not in machine.words


def test_a_file_that_cannot_be_trusted_is_said(machine: Machine) -> None:
    machine.path(sshd.MAIN).rename(machine.path("/etc/ssh/elsewhere"))
    machine.path(sshd.MAIN).symlink_to("elsewhere")
    assert machine.open() == 1
    assert "a link is not replaced" in machine.words
    assert machine.note() is None


@pytest.mark.parametrize("trouble", ["ufw", "drop", "no rule taken"])
def test_a_firewall_that_keeps_strangers_out_all_the_same_gets_a_rule_before_all_others(
    machine: Machine, trouble: str
) -> None:
    if trouble == "ufw":
        machine.fails = {"ufw prepend"}
    elif trouble == "drop":
        machine.extra = "-A INPUT -j DROP\n"
    else:
        machine.extra = "-A INPUT -p tcp -m tcp --dport 22 -j REJECT\n"
    before = list(machine.ufw)
    assert machine.open() == 0, machine.words
    assert machine.direct == {"iptables": 1, "ip6tables": 1}
    # A boot takes the rules away, and the timer brings them back.
    machine.direct = dict.fromkeys(machine.direct, 0)
    machine.close(when_due=True)
    assert machine.direct == {"iptables": 1, "ip6tables": 1}
    machine.fails = set()
    assert machine.close() == 0
    assert (machine.direct, machine.ufw) == ({"iptables": 0, "ip6tables": 0}, before)


def test_where_nothing_opens_the_firewall_it_is_said(machine: Machine) -> None:
    machine.fails = {"ufw prepend", "iptables -w 5 -I", "ip6tables -w 5 -I"}
    assert machine.open() == 1
    assert "The firewall still keeps strangers from port 22 (IPv6)" in machine.words
    assert machine.listening == PUBLIC, "and stays so: that much works"


def test_an_ufw_that_is_off_is_left_off(machine: Machine) -> None:
    machine.ufw_active = False
    assert machine.open() == 0
    assert machine.ufw == [TAILNET_RULE]
    assert machine.direct == {"iptables": 0, "ip6tables": 0}


@pytest.mark.parametrize(
    ("rules", "replaced", "prepend"),
    [
        ([], (), True),
        ([TAILNET_RULE], (), True),
        ([OURS, TAILNET_RULE], (), False),
        ([TAILNET_RULE, OURS], (), True),
        (["allow 22/tcp"], (), False),
        (["allow 22/tcp comment 'mine'"], (), False),
        (["deny 22/tcp comment 'no'"], ("deny 22/tcp comment 'no'",), True),
        (["limit log 22/tcp"], ("limit log 22/tcp",), True),
        (["deny 22", "deny from any"], (), True),
    ],
)
def test_what_is_done_to_ufw(rules: list[str], replaced: tuple[str, ...], *, prepend: bool) -> None:
    found = plan_firewall(rules)
    assert (found.replaced, found.prepend) == (replaced, prepend)


def test_a_rule_that_ours_replaces_comes_back(machine: Machine) -> None:
    machine.ufw = [TAILNET_RULE, "deny 22/tcp comment 'no'"]
    assert machine.open() == 0
    assert machine.ufw == [OURS, TAILNET_RULE]
    machine.open()
    assert machine.close() == 0
    assert machine.ufw == [TAILNET_RULE, "deny 22/tcp comment 'no'"]


def test_a_rule_of_somebody_elses_stays_with_its_comment(machine: Machine) -> None:
    machine.ufw = ["allow 22/tcp comment 'mine'"]
    assert machine.open() == 0
    assert machine.close() == 0
    assert machine.ufw == ["allow 22/tcp comment 'mine'"]


def test_without_systemd_it_is_open_and_says_that_it_stays_so(machine: Machine) -> None:
    machine.fails = {"systemctl enable --now quietport-close.timer"}
    assert machine.open() == 1
    assert "It will not close by itself" in machine.words
    assert machine.listening == PUBLIC


def test_a_user_without_a_key_is_told(machine: Machine) -> None:
    machine.open()
    assert "There is no key in /root/.ssh/authorized_keys" in machine.words
    machine.said.clear()
    machine.put("/root/.ssh/authorized_keys", "ssh-ed25519 AAAA me\n")
    machine.open()
    assert "no key" not in machine.words


# --- beside a guard, and others -----------------------------------------------------------------------


def test_while_a_guard_is_armed_its_rollback_goes_first(machine: Machine) -> None:
    before = state(machine)
    machine.put(ARMED, json.dumps({"schema": 1, "by": "converge of anna"}))
    assert machine.open() == 1
    assert "A change by converge of anna waits for its confirmation here." in machine.words
    assert state(machine) == before
    assert machine.open(force=True) == 0
    assert machine.close() == 1
    machine.now += 2 * HOUR
    assert machine.close(when_due=True) == 0
    assert is_open(machine)
    machine.path(ARMED).unlink()
    assert machine.close(when_due=True) == 0
    assert machine.note() is None


def armed_while_the_lock_is_waited_for(machine: Machine) -> None:
    really = machine.hold

    @contextmanager
    def hold(timeout: float) -> Iterator[None]:
        with really(timeout):
            machine.put(ARMED, json.dumps({"schema": 1, "by": "converge of anna"}))
            yield

    machine.hold = hold  # type: ignore[method-assign]


def test_a_guard_that_is_armed_while_the_lock_is_waited_for_goes_first(machine: Machine) -> None:
    before = state(machine)
    armed_while_the_lock_is_waited_for(machine)
    assert machine.open() == 1
    assert "A change by converge of anna waits for its confirmation here." in machine.words
    assert state(machine) == before


def test_a_guard_that_is_armed_while_it_is_closed_finds_its_snapshot_unchanged(machine: Machine) -> None:
    machine.open()
    armed_while_the_lock_is_waited_for(machine)
    before = state(machine)
    machine.now += 2 * HOUR
    for works in (True, False):
        # Without the tailnet the timer would note why it stays open.
        machine.state = "Running" if works else "Stopped"
        for when_due in (True, False):
            machine.path(ARMED).unlink(missing_ok=True)
            machine.said.clear()
            assert machine.close(when_due=when_due) == (0 if when_due else 1)
            assert ("A change by converge of anna waits" in machine.words) is not when_due
            assert state(machine) == before


@pytest.mark.parametrize("confirmed", [True, False])
def test_closed_past_an_armed_guard_the_timer_stays_for_its_rollback(
    machine: Machine, *, confirmed: bool
) -> None:
    before = state(machine)
    machine.open()
    note = machine.note()
    assert note is not None
    machine.put(ARMED, json.dumps({"schema": 1, "by": "converge of anna"}))
    assert machine.close(force=True) == 0
    assert machine.note() is None
    assert machine.timer
    assert machine.close(force=True) == 0, "not open any more, and that ends the timer as little"
    assert machine.timer
    if not confirmed:
        opened.write(note, machine.path)
        machine.put(sshd.DROP_IN, sshd.render((), public=sshd.public_listeners()))
        machine.ufw, machine.listening = [OURS, TAILNET_RULE], PUBLIC
    machine.path(ARMED).unlink()
    machine.now += 2 * HOUR
    machine.close(when_due=True)
    assert state(machine) == before


@pytest.mark.parametrize(("kept", "when_due"), [(True, True), (False, True), (False, False)])
def test_what_a_guards_rollback_leaves_goes_within_a_minute(
    machine: Machine, *, kept: bool, when_due: bool
) -> None:
    """The rollback takes the note, and knows nothing of the rule before all others and of the timer."""
    machine.extra = "-A INPUT -j DROP\n"
    machine.open()
    assert machine.direct == {"iptables": 1, "ip6tables": 1}
    if not kept:
        opened.forget(machine.path)
    assert machine.close(when_due=when_due) == 0
    assert machine.direct == ({"iptables": 1, "ip6tables": 1} if kept else {"iptables": 0, "ip6tables": 0})
    assert machine.timer is kept


class Gone(BaseException):
    """The power is gone: nothing of its own code runs any more."""


REPLACED = "deny 22/tcp"


@pytest.mark.parametrize("dies_at", ["systemctl restart ssh", "ufw status", "ufw delete", "ufw prepend"])
def test_what_ends_half_way_is_noted_and_closed_by_the_timer(machine: Machine, dies_at: str) -> None:
    machine.ufw = [TAILNET_RULE, REPLACED]
    before = state(machine)
    really = machine.run

    def run(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        if " ".join(argv).startswith(dies_at):
            raise Gone
        return really(argv)

    machine.run = run
    with pytest.raises(Gone):
        machine.open()
    machine.run = really
    note = machine.note()
    assert note is not None
    assert machine.timer
    assert REPLACED in machine.ufw or REPLACED in note.replaced
    machine.now += 2 * HOUR
    machine.close(when_due=True)
    assert state(machine) == before


def test_the_timer_is_on_the_disk_before_sshd_moves(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    really = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        really(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    machine.fails = {"systemctl restart"}
    machine.open()
    first = next(at for at, name in enumerate(synced) if name.startswith(".quietport.") or "sshd" in name)
    for path in UNITS:
        assert any(Path(path).name in name for name in synced[:first]), synced


def test_who_does_not_get_the_lock_changes_nothing(machine: Machine) -> None:
    before = state(machine)
    machine.held = True
    assert (machine.open(), machine.close(), machine.close(when_due=True)) == (1, 1, 0)
    assert machine.words.count("Another change is under way.") == 2
    assert state(machine) == before


# --- closing ------------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no address": ({"addresses": ()}, "No address is on tailscale0."),
    "logged out": ({"state": "NeedsLogin"}, "tailscale is NeedsLogin, not Running."),
    "stopped": ({"absent": {"tailscale"}}, "tailscale is not there, or does not answer, not Running."),
    "not bindable": ({"bindable": False}, "sshd could not listen on 100.64.0.1."),
}


@pytest.mark.parametrize("broken", list(BROKEN))
@pytest.mark.parametrize("how", ["by hand", "by the timer"])
def test_without_the_tailnet_it_stays_open(machine: Machine, broken: str, how: str) -> None:
    machine.open()
    for name, value in BROKEN[broken][0].items():
        setattr(machine, name, value)
    machine.now += 2 * HOUR
    machine.said.clear()
    for _ in range(3):
        assert machine.close(when_due=how != "by hand") == (1 if how == "by hand" else 0)
        assert is_open(machine)
    # The timer says it once, somebody who asks is told each time.
    assert machine.words.count(BROKEN[broken][1]) == (3 if how == "by hand" else 1)


def test_the_timer_closes_when_the_time_is_over_and_not_before(machine: Machine) -> None:
    before = state(machine)
    machine.open()
    machine.now += HOUR - 1
    assert machine.close(when_due=True) == 0
    assert is_open(machine)
    machine.now += 1
    assert machine.close(when_due=True) == 0
    assert state(machine) == before


def test_the_timer_closes_as_soon_as_the_tailnet_is_back(machine: Machine) -> None:
    machine.open()
    machine.state = "NoState"
    machine.now += 2 * HOUR
    machine.close(when_due=True)
    machine.state, machine.addresses = "Running", ("100.64.0.9",)
    machine.close(when_due=True)
    assert machine.note() is None
    assert machine.listening == {("100.64.0.9", 22)}


def test_it_closes_although_nobody_gets_in_only_when_somebody_insists(machine: Machine) -> None:
    machine.open()
    machine.addresses, machine.state = (), "Stopped"
    assert machine.close() == 1
    assert machine.close(force=True) == 0
    assert machine.listening == {("127.0.0.1", 22)}
    assert "Closed, as you insist" in machine.words


def test_a_close_that_fails_leaves_it_open(machine: Machine) -> None:
    machine.open()
    machine.fails = {"/usr/sbin/sshd -t"}
    assert machine.close() == 1
    assert is_open(machine)
    machine.fails = {"ufw delete"}
    assert machine.close() == 1
    assert machine.note() is not None
    machine.fails = set()
    assert machine.close() == 0
    assert machine.ufw == [TAILNET_RULE]


def test_break_glass_stays_what_it_was(machine: Machine) -> None:
    machine.put(sshd.DROP_IN, sshd.render((), public=sshd.public_listeners()))
    machine.listening = PUBLIC
    before = state(machine)
    machine.addresses, machine.state = (), "Stopped"
    assert machine.open() == 0
    assert machine.close() == 0, "there is another way in than the tailnet"
    assert state(machine) == before


def test_break_glass_too_is_closed_by_itself_only_when_the_tailnet_works(machine: Machine) -> None:
    machine.put(sshd.DROP_IN, sshd.render((), public=sshd.public_listeners()))
    machine.listening = PUBLIC
    machine.addresses, machine.state = (), "Stopped"
    machine.open()
    machine.now += 2 * HOUR
    for _ in range(2):
        assert machine.close(when_due=True) == 0
        assert is_open(machine)
    assert "It would not close now: No address is on tailscale0." in "\n".join(
        machine.door().status(machine.note())
    )
    machine.addresses, machine.state = TAILNET, "Running"
    assert machine.close(when_due=True) == 0
    assert machine.note() is None


def test_what_is_not_open_is_closed_and_leaves_no_timer(machine: Machine) -> None:
    assert machine.close() == 0
    assert "not open" in machine.words
    machine.open()
    opened.forget(machine.path)
    assert machine.close(when_due=True) == 0
    assert not machine.timer
    assert [machine.text(path) for path in UNITS] == [None, None]


def test_a_converge_forgets_the_note_when_sshd_and_ufw_are_in_order(machine: Machine) -> None:
    before = state(machine)
    machine.extra = "-A INPUT -j DROP\n"
    machine.open()
    machine.put(sshd.DROP_IN, sshd.render(TAILNET))
    machine.listening = CLOSED
    machine.ufw = [TAILNET_RULE]
    restarts = machine.ran.count("systemctl restart ssh.service")
    assert machine.close(note_only=True) == 0
    assert state(machine) == before
    assert machine.ran.count("systemctl restart ssh.service") == restarts
    assert machine.close(note_only=True) == 0


def test_status_tells_how_it_stands(machine: Machine) -> None:
    assert list(machine.door().status(None)) == ["Not open. sshd listens on 100.64.0.1:22."]
    machine.open()
    machine.state = "Stopped"
    told = "\n".join(machine.door().status(machine.note()))
    assert "Open: opened by hand since 2027-01-15 08:00 UTC, at least until 2027-01-15 09:00 UTC." in told
    assert "sshd listens on 0.0.0.0:22, [::]:22" in told
    assert "It would not close now: tailscale is Stopped, not Running." in told
    machine.state = "Running"
    assert "It would close now: the tailnet works." in "\n".join(machine.door().status(machine.note()))


# --- the note -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": 1}', '{"since": 1, "until": "x"}'])
def test_a_damaged_note_is_a_note_whose_time_is_over(text: str) -> None:
    assert opened.parse(text.encode()) == Opened()
    assert opened.at(float("inf")) == opened.at(1e300) == "an unknown time"


def test_sshd_may_start_in_public_while_the_note_is_there(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opened.read, "__defaults__", (machine.path,))
    monkeypatch.setattr(sshd_wait, "host_settings", dict)
    monkeypatch.setattr(survey, "host_settings", dict)
    assert "does not say that it may" in sshd_wait.why_not_public()
    assert survey._public_sshd() is None
    machine.open()
    assert sshd_wait.why_not_public() == ""
    found = survey._public_sshd()
    assert found is not None
    assert "opened by hand since" in found.problem
    # Whoever can write there is root; a note that others could have written is none.
    machine.path(str(OPENED)).chmod(0o666)
    assert sshd_wait.why_not_public() != ""


def test_the_follower_pauses(machine: Machine) -> None:
    machine.open()
    seen = sshd_follow.look(machine, ["100.64.0.9"])
    assert seen.decision.text is None


# --- times --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1h", 3600), ("90m", 5400), ("1h30m", 5400), ("2d", 172800), ("1m", 60), ("7d", 604800)],
)
def test_times(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "1", "h", "0m", "8d", "1h 30m", "1w", "-1h", "1.5h", "one hour", "1h30"]
)
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match="time"):
        seconds_of(text)


@given(st.text(max_size=8))
def test_any_text_is_a_time_or_an_error(text: str) -> None:
    with suppress(ValueError):
        assert 60 <= seconds_of(text) <= 7 * 86400


def test_rules_are_read_as_ufw_prints_them() -> None:
    text = f"Added user rules (see 'ufw status' for running firewall):\nufw {OURS}\nufw deny 25\n"
    assert parse_added(text) == [OURS, "deny 25"]
    assert parse_added("Added user rules:\n(None)\n") == []
