"""One fixture per path of every fact, and the commands themselves in a shell that finds no program."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pyinfra.api.exceptions import FactProcessError
from pyinfra.api.facts import FactBase
from pyinfra_testing.facts import make_fact_tests

from facts import (
    apt,
    controller,
    docker,
    files,
    packages,
    packetfilter,
    sessions,
    shell,
    sockets,
    sshd,
    system,
    tailnet,
    ufw,
    units,
)
from facts.docker import READ_PUBLISHED

FIXTURES = Path(__file__).parent
# Facts of this folder; others keep their tests with their operations.
COMMANDS: list[tuple[FactBase[Any], tuple[Any, ...]]] = [
    (apt.OfferedKey(), ("http://127.0.0.1:9/key", "/nowhere/it's.gpg")),
    (apt.Sources(), ()),
    (controller.Controller(), ()),
    (docker.Docker(), ()),
    (docker.PublishedPorts(), ()),
    (files.FileState(), ("/nowhere/it's",)),
    (files.FileText(), ("/nowhere/it's",)),
    (packages.Packages(), (["ufw", "docker.io"],)),
    (packetfilter.PacketFilter(), ()),
    (sessions.Sessions(), ()),
    (sshd.SshdEffective(), ("root", "198.51.100.1")),
    (sshd.SshdFiles(), ()),
    (sshd.SshdProcess(), ()),
    (system.System(), ()),
    (tailnet.Tailnet(), ()),
    (ufw.Ufw(), ()),
    (units.OwnTimers(), ()),
    (units.Units(), (["ssh.service", "ssh@.socket"],)),
]

for _folder in sorted(FIXTURES.glob("*.*/")):
    if _folder.is_dir():
        globals()[f"Test_{_folder.name}"] = make_fact_tests("facts", _folder.name, _folder)


def test_every_fact_has_fixtures() -> None:
    covered = {folder.name for folder in FIXTURES.glob("*.*/") if folder.is_dir()}
    expected = {fact.name.removeprefix("facts.") for fact, _ in COMMANDS}
    expected |= {"sockets.ListeningSockets", "sockets.Reachable"}
    assert expected <= covered


@pytest.mark.parametrize(("fact", "arguments"), COMMANDS, ids=lambda value: getattr(value, "name", ""))
def test_a_host_without_the_programs_gets_the_fact_as_a_value(
    fact: Any, arguments: tuple[Any, ...], tmp_path: Path
) -> None:
    """The shell finds sed and nothing else: no fact fails, and none is None but an absent file's text."""
    (tmp_path / "sed").symlink_to("/bin/sed")
    done = subprocess.run(
        ["/bin/sh", "-c", fact.command(*arguments)],
        capture_output=True,
        env={"PATH": str(tmp_path)},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    value = fact.process(done.stdout.decode().split("\n")[:-1])
    json.dumps(value)
    assert (value is None) == isinstance(fact, files.FileText)


@pytest.mark.parametrize(("fact", "arguments"), COMMANDS, ids=lambda value: getattr(value, "name", ""))
def test_the_value_for_a_failed_host_has_the_shape_of_a_real_one(
    fact: Any, arguments: tuple[Any, ...]
) -> None:
    """pyinfra hands out default() when a command failed; a crash over it would stop all hosts."""
    default = fact.default()
    if isinstance(fact, files.FileText):
        assert default is None
        return
    done = subprocess.run(["/bin/sh", "-c", fact.command(*arguments)], capture_output=True, check=True)
    value = fact.process(done.stdout.decode(errors="replace").split("\n")[:-1])
    assert type(default) is type(value)
    if isinstance(value, dict) and not isinstance(fact, sshd.SshdEffective | sshd.SshdFiles) and default:
        assert set(default) == set(value)


def test_sockets_that_could_not_be_read_are_not_a_quiet_host() -> None:
    output = ["##sockets", "|", "|127"] + [
        line
        for name in (
            *("addresses", "routes4", "routes6", "programs"),
            *("units", "declared", "filter4", "filter6"),
        )
        for line in (f"##{name}", "|[]", "|0")
    ]
    with pytest.raises(FactProcessError, match="iproute2"):
        sockets.ListeningSockets().process(output)


@pytest.mark.parametrize(("silent", "words"), [("published", "status docker"), ("served", "serve status")])
def test_a_daemon_that_does_not_answer_is_not_one_that_has_nothing(silent: str, words: str) -> None:
    """Docker may forward ports and tailscaled may have a Funnel: the host fails, and says where to look."""
    parts = {
        "sockets": "Netid State Recv-Q Send-Q Local Address:Port Peer Address:PortProcess",
        "addresses": '[{"ifname": "lo", "link_type": "loopback"}]',
        **dict.fromkeys(("routes4", "routes6"), "[]"),
        **dict.fromkeys(("programs", "declared", "filter4", "filter6"), ""),
        **dict.fromkeys(("vsock", "units", "published", "served"), ""),
    }

    def answer(code: int) -> list[str]:
        codes = {silent: code}
        return [
            line
            for name, text in parts.items()
            for line in (f"##{name}", f"|{text}", "|", f"|{codes.get(name, 0)}")
        ]

    assert sockets.Reachable().process(answer(0)) == []
    with pytest.raises(FactProcessError, match=words):
        sockets.Reachable().process(answer(1))


@pytest.mark.parametrize(
    "fixture", sorted((FIXTURES / "sockets.ListeningSockets").glob("*.yaml")), ids=lambda path: path.stem
)
def test_both_facts_judge_a_socket_alike(fixture: Path) -> None:
    told = yaml.safe_load(fixture.read_text())
    beyond = [line for name in ("vsock", "published", "served") for line in (f"##{name}", "|", "|0")]
    assert sockets.Reachable().process([*told["output"], *beyond]) == told["fact"]


def test_an_engine_that_runs_and_does_not_answer_is_not_one_that_publishes_nothing() -> None:
    output = ["##engine", "|", "|0", "##ports", "|", "|1"]
    with pytest.raises(FactProcessError, match="status docker"):
        docker.PublishedPorts().process(output)


@pytest.mark.parametrize(
    ("programs", "spaces", "docker", "expected"),
    [
        ((), "7", "exit 9", (0, "")),
        (("containerd-shim",), "7", "exit 9", (1, "")),
        (("dockerd",), "7", "exit 9", (1, "")),
        (("dockerd",), "7", "true", (0, "")),
        # Those of a container.
        (("dockerd", "containerd-shim"), "7\t1", "exit 9", (0, "")),
        (("dockerd",), "7", 'test "$1" = ps && echo abc || printf "%s\\n" "$*"', (0, "inspect --format")),
        (("dockerd",), "7", 'test "$1" = ps && echo abc || exit 1', (1, "")),
    ],
)
def test_docker_is_asked_when_it_runs_and_must_answer(
    programs: tuple[str, ...], spaces: str, docker: str, expected: tuple[int, str], tmp_path: Path
) -> None:
    """The shell command itself, with a docker that stands in and names of processes in files."""
    for number, name in enumerate(programs):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "status").write_text(f"Name:\t{name}\nNSpid:\t{spaces}\n")
    stand_in = tmp_path / "bin" / "docker"
    stand_in.parent.mkdir()
    stand_in.write_text(f"#!/bin/sh\n{docker}\n")
    stand_in.chmod(0o755)
    command = READ_PUBLISHED.replace("/proc/", f"{tmp_path}/")
    environment = {"PATH": f"{stand_in.parent}:/usr/bin:/bin"}
    done = subprocess.run(
        ["/bin/sh", "-c", command], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == expected[0]
    assert done.stdout.startswith(expected[1])
    assert bool(done.stdout) == bool(expected[1])


@pytest.mark.parametrize(
    "text", ["", "no newline", "a newline\n", "\n\nblank lines\n\n", "##sockets\n|0\n", "tab\tand \x1b[1m\n"]
)
@pytest.mark.parametrize("code", [0, 1, 255])
def test_sections_carry_text_and_code_unchanged(text: str, code: int) -> None:
    command = shell.sections(first=f"printf %s {shell.quoted([text])}; exit {code}", second="echo 'more'")
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, check=True)
    parts = shell.split(done.stdout.decode().split("\n")[:-1], "first", "second")
    assert parts["first"] == shell.Section(text, code)
    assert parts["second"] == shell.Section("more\n", 0)


def test_noise_before_the_first_section_is_ignored() -> None:
    assert shell.split(["Welcome!", "|0", "##a", "|x", "|0"], "a")["a"] == shell.Section("x", 0)


@pytest.mark.parametrize("output", [[], ["##a"], ["##a", "|text"], ["##b", "|0"]])
def test_an_answer_that_was_cut_off_fails_the_host(output: list[str]) -> None:
    with pytest.raises(FactProcessError, match="'a'"):
        shell.split(output, "a")


def test_a_process_cannot_write_a_program_into_the_answer(tmp_path: Path) -> None:
    text = (
        "0::/init.scope\npid 7\n0::/user.slice/session-1.scope\nexe /home/a/x?pid 8?exe /usr/sbin/tailscaled"
    )
    assert set(sockets.parse_programs(text)) == {7}


def test_a_file_that_is_there_but_cannot_be_read_is_not_absent() -> None:
    with pytest.raises(FactProcessError):
        files.FileText().process(["##present", "|", "|0", "##text", "|", "|1"])
    with pytest.raises(FactProcessError):
        files.FileState().process(
            ["##stat", "|", "|1", "##present", "|", "|0", "##sha256", "|", "|1", "##target", "|", "|1"]
        )


@pytest.mark.parametrize("name", ["plain", "with space", "it's", "$(touch x)", "-n", "new\nline"])
def test_file_facts_take_any_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"secret\xff\n")
    path.chmod(0o4640)
    for fact, expected in ((files.FileState(), "file"), (files.FileText(), "secret\ufffd\n")):
        done = subprocess.run(
            ["/bin/sh", "-c", fact.command(str(path))], capture_output=True, check=True, cwd=tmp_path
        )
        value = fact.process(done.stdout.decode().split("\n")[:-1])
        assert (value if isinstance(value, str) else value["kind"]) == expected
        if isinstance(value, dict):
            assert (value["mode"], value["size"]) == ("4640", 8)
    assert not (tmp_path / "x").exists()


def test_apt_locks_name_their_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real lock, held by this process, and a second file nobody locks."""
    import fcntl
    import os

    held, free = tmp_path / "held", tmp_path / "free"
    held.touch()
    free.touch()
    command = system.System().command()
    for wanted, path in zip(system.APT_LOCKS, (held, free, free, free), strict=True):
        command = command.replace(f" {wanted};", f" {path};").replace(f" {wanted} ", f" {path} ")
    with held.open("w") as stream:
        fcntl.lockf(stream, fcntl.LOCK_EX)
        done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, check=True)
    comm = Path("/proc/self/comm").read_text().strip()
    locks = system.System().process(done.stdout.decode().split("\n")[:-1])["apt_locks"]
    assert locks == [{"path": str(held), "pid": os.getpid(), "process": comm}]


@pytest.mark.parametrize("fact", [units.Units(), packages.Packages()])
def test_names_typed_on_the_command_line(fact: Any) -> None:
    assert fact.command("a.service,b.service") == fact.command(["a.service", "b.service"])
    assert fact.command("a.service") == fact.command(("a.service",))


_FUZZED = [*COMMANDS, (sockets.ListeningSockets(), ()), (sockets.Reachable(), ())]
_LINES = st.lists(
    st.sampled_from(
        ["", "0", "x", "a=b", "MainPID=x", "pid 7", "[]", "{}", "[1]", '{"v1": 1}', '{"Self": 1}', "-"]
    )
    | st.text(max_size=20),
    max_size=5,
)


@pytest.mark.parametrize(("fact", "arguments"), _FUZZED, ids=lambda value: getattr(value, "name", ""))
@given(data=st.data())
def test_odd_output_fails_one_host_at_most(
    fact: Any, arguments: tuple[Any, ...], data: st.DataObject
) -> None:
    """Anything but FactProcessError in a fact would end the run for every host."""
    output = []
    for name in re.findall(r"echo '##(\w+)'", fact.command(*arguments)):
        lines = [part for line in data.draw(_LINES) for part in line.split("\n")]
        output += [
            f"##{name}",
            *(f"|{line}" for line in lines),
            f"|{data.draw(st.sampled_from([0, 0, 0, 1, 127]))}",
        ]
    try:
        json.dumps(fact.process(output))
    except FactProcessError:
        return
