"""sshd-restore: sshd in public as it was without us, or as it is; played on a host of files."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quietport import sshd
from quietport.sshd_apply import Failed, Host
from quietport.sshd_restore import Restore, planned, shipped_with_socket

FOREIGN = f"{sshd.FOLDER}/60-admin.conf"
BEFORE = {
    sshd.MAIN: "Include /etc/ssh/sshd_config.d/*.conf\nPort 2222\nUsePAM yes\n",
    FOREIGN: "# IPv4 is enough\nListenAddress 0.0.0.0\nMaxAuthTries 4\n",
}
TAILNET = frozenset({("100.64.0.1", 22)})
UNIT_TEXT = "# Written by quietport.\n[Service]\nRestartSec=2\n"


def converged(before: dict[str, str]) -> dict[str, str]:
    return {**sshd.wanted_files(before, sshd.render(["100.64.0.1"])), sshd.UNIT_DROP_IN: UNIT_TEXT}


class Machine:
    """systemctl and sshd as they would answer; sshd listens where the files that are there say."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ran: list[str] = []
        self.fails: set[str] = set()
        self.enabled = {"ssh.service"}
        self.active = {"ssh.service"}
        self.exists = {"ssh.service", "ssh.socket"}
        self.policy = "pubkeyauthentication yes\npermitrootlogin yes\n"
        self.deaf = False
        self.listening = TAILNET

    def files(self) -> dict[str, str]:
        return {
            f"/{path.relative_to(self.root)}": path.read_text()
            for path in self.root.glob("etc/**/*")
            if path.is_file() and not path.is_symlink()
        }

    def masked(self) -> set[str]:
        return {
            path.name for path in (self.root / "etc/systemd/system").glob("*.socket") if path.is_symlink()
        }

    def put(self, files: dict[str, str]) -> None:
        for path, text in files.items():
            place = self.root / path.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)

    def mask(self, unit: str) -> None:
        place = self.root / "etc/systemd/system" / unit
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to("/dev/null")

    def __call__(self, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        line = " ".join(argv)
        self.ran.append(line)
        if any(line.startswith(prefix) for prefix in self.fails):
            return subprocess.CompletedProcess(list(argv), 1, "", "it was told to fail")
        return subprocess.CompletedProcess(list(argv), 0, self._answer(list(argv)), "")

    def _answer(self, argv: list[str]) -> str:
        if argv[0] != "systemctl":
            return self._sshd(argv)
        verb, units = argv[1], argv[2:]
        if verb == "show":
            return self._show(units[0])
        if verb == "is-enabled":
            return "masked" if units[0] in self.masked() else "disabled"
        for unit in units:
            if verb == "mask":
                self.mask(unit)
            elif verb == "unmask":
                (self.root / "etc/systemd/system" / unit).unlink(missing_ok=True)
            elif verb in ("enable", "disable"):
                (self.enabled.add if verb == "enable" else self.enabled.discard)(unit)
            elif verb in ("start", "restart"):
                self.active.add(unit)
            elif verb == "stop":
                self.active.discard(unit)
            if verb in ("start", "restart", "stop") and unit in ("ssh.service", "ssh.socket"):
                self._listen()
        return ""

    def _show(self, unit: str) -> str:
        load = "masked" if unit in self.masked() else "loaded" if unit in self.exists else "not-found"
        state = "" if unit not in self.exists else "enabled" if unit in self.enabled else "disabled"
        active = "active" if unit in self.active else "inactive"
        return f"UnitFileState={state}\nActiveState={active}\nLoadState={load}\nMainPID=77\n"

    def _sshd(self, argv: list[str]) -> str:
        main = Path(argv[argv.index("-f") + 1])
        files = {sshd.MAIN: main.read_text().replace(str(main.parent / "sshd_config.d"), sshd.FOLDER)}
        for part in (main.parent / "sshd_config.d").iterdir():
            files[f"{sshd.FOLDER}/{part.name}"] = part.read_text()
        return self.policy + "".join(f"listenaddress {sshd.endpoint(one)}\n" for one in sorted(where(files)))

    def _listen(self) -> None:
        files = {path: text for path, text in self.files().items() if path.startswith("/etc/ssh/")}
        answers = self.active & {"ssh.service", "ssh.socket"} and not (
            self.deaf and sshd.DROP_IN not in files
        )
        self.listening = where(files) if answers else frozenset()


def where(files: dict[str, str]) -> frozenset[sshd.Listener]:
    """As sshd takes Port and ListenAddress, for what the tests write."""
    lines = [line for line in sshd.reading_order(files) if line.args]
    ports = [int(line.args[0]) for line in lines if line.keyword == "port"] or [22]
    found: set[sshd.Listener] = set()
    for line in lines:
        if line.keyword == "listenaddress":
            host, _, port = line.args[0].partition(":")
            found |= {(host, int(port))} if port else {(host, one) for one in ports}
    return frozenset(found or {(any_, port) for any_ in ("0.0.0.0", "::") for port in ports})


class FakeHost(Host):
    def __init__(self, machine: Machine) -> None:
        super().__init__(root=machine.root, run=machine)
        self.machine = machine

    def ssh_listeners(self) -> frozenset[sshd.Listener]:
        return self.machine.listening


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr("quietport.sshd_apply.LISTEN_TIMEOUT_S", 0)
    made = Machine(tmp_path)
    made.put(converged(BEFORE))
    made.mask("ssh.socket")
    made.mask("sshd-vsock.socket")
    return made


def play(
    machine: Machine, *, ports: Sequence[int] = (2222,), user: str = "root", by_socket: bool = False
) -> tuple[bool, str]:
    said: list[str] = []
    host = FakeHost(machine)
    done = Restore(host, ports=ports, user=user, by_socket=by_socket, say=said.append)()
    return done, "\n".join(said)


def test_everything_is_as_it_was(machine: Machine) -> None:
    assert machine.files() != BEFORE, "the control"
    done, said = play(machine)
    assert done, said
    assert machine.files() == BEFORE
    assert machine.masked() == set()
    assert machine.listening == {("0.0.0.0", 2222)}
    assert machine.enabled == {"ssh.service"}
    assert "0.0.0.0:2222, as the distribution ships it" in said


def test_the_unit_lets_a_public_sshd_start_before_there_is_one(machine: Machine) -> None:
    """A power cut between two files: while the unit's drop-in is there, a boot would leave no sshd at all."""
    order: list[str] = []
    host = FakeHost(machine)
    really = host.place
    host.place = lambda path, staged: (order.append(path), really(path, staged))[1]  # type: ignore[method-assign]
    restore = Restore(host, ports=[2222], user="root", by_socket=False, say=print)
    assert restore()
    assert order[:2] == [sshd.UNIT_DROP_IN, sshd.DROP_IN]
    assert sorted(order[2:]) == sorted(BEFORE)


def test_a_second_time_there_is_nothing_to_write(machine: Machine) -> None:
    play(machine)
    assert planned(FakeHost(machine)) == {}


def test_ubuntus_sshd_is_started_by_its_socket(machine: Machine) -> None:
    machine.put(converged({sshd.MAIN: "Include /etc/ssh/sshd_config.d/*.conf\n"}))
    (machine.root / FOREIGN.lstrip("/")).unlink()
    done, said = play(machine, ports=[22], by_socket=True)
    assert done, said
    assert machine.enabled == {"ssh.socket"}
    assert machine.active == {"ssh.socket"}
    assert machine.listening == {("0.0.0.0", 22), ("::", 22)}


def test_without_such_a_socket_it_is_the_service(machine: Machine) -> None:
    machine.exists.discard("ssh.socket")
    done, said = play(machine, by_socket=True)
    assert done, said
    assert "ssh.service" in machine.active & machine.enabled


def untouched(machine: Machine) -> bool:
    masks = {"ssh.socket", "sshd-vsock.socket"}
    return (machine.files(), machine.masked(), machine.listening) == (converged(BEFORE), masks, TAILNET)


@pytest.mark.parametrize(
    ("policy", "user", "why"),
    [
        ("pubkeyauthentication no\npermitrootlogin yes\n", "root", "root could not log in with a key"),
        ("pubkeyauthentication yes\npermitrootlogin no\n", "root", "root could not log in (PermitRootLogin)"),
        ("pubkeyauthentication yes\npermitrootlogin forced-commands-only\n", "root", "(PermitRootLogin)"),
    ],
)
def test_who_could_not_get_in_keeps_the_tailnet(machine: Machine, policy: str, user: str, why: str) -> None:
    machine.policy = policy
    done, said = play(machine, user=user)
    assert not done
    assert why in said
    assert "nothing was changed" in said
    assert untouched(machine)


def test_another_user_may_be_the_one(machine: Machine) -> None:
    machine.policy = "pubkeyauthentication yes\npermitrootlogin no\n"
    assert play(machine, user="admin")[0]


def test_a_port_that_the_firewall_does_not_know_of_is_refused(machine: Machine) -> None:
    done, said = play(machine, ports=[22])
    assert not done
    assert "would listen on port 2222, and the firewall was opened for 22" in said
    assert untouched(machine)


def test_files_that_were_not_public_before_either_are_refused(machine: Machine) -> None:
    private = {sshd.MAIN: "Include /etc/ssh/sshd_config.d/*.conf\nListenAddress 127.0.0.1\n"}
    machine.put(converged(private))
    (machine.root / FOREIGN.lstrip("/")).unlink()
    done, said = play(machine, ports=[22])
    assert not done
    assert "would listen on no public address" in said


def test_a_candidate_that_sshd_refuses_touches_nothing(machine: Machine) -> None:
    machine.fails = {"/usr/sbin/sshd -t"}
    done, said = play(machine)
    assert not done
    assert "sshd refuses its files as they were: it was told to fail" in said
    assert untouched(machine)


@pytest.mark.parametrize("step", ["systemctl unmask", "systemctl daemon-reload", "systemctl enable"])
def test_a_step_that_fails_puts_everything_back(machine: Machine, step: str) -> None:
    machine.fails = {step}
    done, said = play(machine)
    assert not done
    assert "it was told to fail" in said
    assert untouched(machine), said


def test_an_sshd_that_does_not_answer_puts_everything_back(machine: Machine) -> None:
    machine.deaf = True
    done, said = play(machine)
    assert not done
    assert "sshd listens on nothing, not on 0.0.0.0:2222" in said
    assert "the old state is back" in said
    assert untouched(machine), said


def test_what_is_not_ours_stays(machine: Machine) -> None:
    theirs = {sshd.DROP_IN: "ListenAddress 0.0.0.0\n", sshd.UNIT_DROP_IN: "[Service]\nNice=1\n"}
    machine.put({**BEFORE, **theirs})
    assert planned(FakeHost(machine)) == {}


def test_files_that_cannot_be_trusted_stop_it(machine: Machine) -> None:
    main = machine.root / sshd.MAIN.lstrip("/")
    main.rename(main.with_name("elsewhere"))
    main.symlink_to("elsewhere")
    with pytest.raises(Failed, match="a link is not replaced"):
        planned(FakeHost(machine))


@pytest.mark.parametrize(
    ("text", "expected"),
    [('NAME="Ubuntu"\nID=ubuntu\n', True), ("ID=debian\n", False), ('ID="ubuntu"\n', True), ("", False)],
)
def test_which_distribution_has_the_socket(text: str, *, expected: bool) -> None:
    assert shipped_with_socket(text) is expected


# --- pure ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("main", "foreign", "ports"),
    [
        ("", "", [22]),
        ("Port 2222\n", "", [2222]),
        ("Port 22\nPort 2222\n", "", [22, 2222]),
        ("Port 2222\n", "ListenAddress 0.0.0.0\n", [2222]),
        ("Port 2222\n", "ListenAddress 0.0.0.0:443\n", [443]),
        ("", "ListenAddress [::]:443\nListenAddress 192.0.2.1\n", [22, 443]),
        ("", "ListenAddress 2001:db8::1\n", [22]),
        ("", "ListenAddress [2001:db8::1]\n", [22]),
        ("", "ListenAddress 127.0.0.1:2200\nListenAddress 192.0.2.1:443\n", [443]),
        ("", "ListenAddress 127.0.0.1\nListenAddress [::1]:8\n", []),
        ("Port nonsense\n", "", [22]),
    ],
)
def test_the_ports_that_files_tell(main: str, foreign: str, ports: list[int]) -> None:
    files = {sshd.MAIN: f"Include /etc/ssh/sshd_config.d/*.conf\n{main}", FOREIGN: foreign}
    assert sshd.public_ports(files) == ports
    assert sshd.public_ports(sshd.without_ours(converged(files))) == ports


lines = st.sampled_from(
    [
        *(
            "Port 22",
            "Port 2222",
            "ListenAddress 0.0.0.0",
            "ListenAddress [::]:22",
            "PasswordAuthentication yes",
        ),
        *(
            "# a comment",
            "",
            "Match User bob",
            "  AuthenticationMethods any",
            "UsePAM no",
            "AddressFamily inet",
        ),
        *(
            "Include /etc/ssh/sshd_config.d/*.conf",
            "PermitRootLogin no",
            "\tKbdInteractiveAuthentication yes",
        ),
    ]
)
texts = st.lists(lines, max_size=8).map(lambda some: "\n".join(some) + "\n")


@given(texts, texts, st.booleans())
def test_converge_and_back_is_no_change(main: str, foreign: str, public: bool) -> None:
    files = {sshd.MAIN: main, FOREIGN: foreign}
    listeners = sshd.public_listeners() if public else []
    there = sshd.wanted_files(files, sshd.render(["100.64.0.1"], public=listeners))
    assert sshd.without_ours(there) == files
    assert sshd.without_ours(files) == files
