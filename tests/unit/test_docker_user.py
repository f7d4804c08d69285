"""The chains that keep the public side away from containers: their text, and packets in namespaces."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quietport import docker_user
from quietport.cli import main
from quietport.commands import Done
from quietport.docker_user import (
    PLACES,
    Port,
    backend_of,
    data_root_of,
    foreign_rules,
    problems,
    published,
    restore_text,
    rules,
)
from quietport.errors import HostProgramError
from quietport.hostfile import HostFileError

ROOT = Path(__file__).parents[2]
MANGLE, FILTER, INPUT = PLACES


def listing(chain_rules: list[str], forward: list[str]) -> str:
    return "\n".join(["-P FORWARD ACCEPT", "-N DOCKER-USER", *forward, *chain_rules]) + "\n"


GOOD = rules(FILTER)
JUMP = "-A FORWARD -j DOCKER-USER"


@pytest.mark.parametrize(
    ("chain", "forward", "expected"),
    [
        (GOOD, [JUMP], 0),
        ([*GOOD, "-A DOCKER-USER -j RETURN"], [JUMP, "-A FORWARD -o docker0 -j DOCKER"], 0),
        (GOOD, ["-A FORWARD -j ts-forward", JUMP], 0),
        ([], [], 2),
        ([], [JUMP], 1),
        (GOOD, [], 1),
        (GOOD, ["-A FORWARD -o docker0 -j DOCKER", JUMP], 1),
        (GOOD, ["-A FORWARD -j ufw-before-forward", JUMP], 1),
        (GOOD[:-1], [JUMP], 1),
        (["-A DOCKER-USER -s 192.0.2.1/32 -j ACCEPT", *GOOD], [JUMP], 2),
        ([*GOOD, *GOOD], [JUMP], 1),
        ([GOOD[0], GOOD[4]], [JUMP], 1),
    ],
)
def test_what_is_not_as_wanted_is_seen(chain: list[str], forward: list[str], expected: int) -> None:
    assert len(problems(FILTER, listing(chain, forward))) == expected


def test_replies_come_first_and_the_rest_is_dropped() -> None:
    assert "RELATED,ESTABLISHED" in GOOD[0]
    assert GOOD[0].endswith("-j RETURN")
    assert GOOD[-1] == "-A DOCKER-USER -m comment --comment quietport -j DROP"
    assert not any(" -s " in rule for rule in GOOD)


def test_published_ports_are_those_that_are_not_on_loopback() -> None:
    configs: list[dict[str, Any]] = [
        {},
        {"PortBindings": None},
        {"PortBindings": {"80/tcp": [{"HostIp": "", "HostPort": "8080"}], "53/udp": [{"HostPort": "53"}]}},
        {"PortBindings": {"5432/tcp": [{"HostIp": "::", "HostPort": "5432"}], "9/sctp": [{"HostPort": "9"}]}},
        {"PortBindings": {"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": "81"}, {"HostPort": "8080"}]}},
        {"PortBindings": {"80/tcp": [{"HostIp": "::1", "HostPort": "82"}], "81/tcp": [{"HostPort": ""}]}},
        {"PortBindings": {"80/tcp": [{"HostPort": "8000-8010"}], "90/tcp": None}},
    ]
    found = [(port.protocol, port.number) for port in published(configs)]
    assert found == [("tcp", "5432"), ("tcp", "8000:8010"), ("tcp", "8080"), ("udp", "53")]


def test_published_ports_are_dropped_for_the_host_and_not_named_elsewhere() -> None:
    ports = [Port("tcp", "5432")]
    assert rules(FILTER, ports) == GOOD
    *returns, drop = rules(INPUT, ports)
    assert drop == ("-A QUIETPORT-INPUT -p tcp -m tcp --dport 5432 -m comment --comment quietport -j DROP")
    assert rules(INPUT) == returns
    assert any("-i lo " in rule for rule in returns)
    assert not [rule for rule in returns if "DROP" in rule]


@pytest.mark.parametrize(
    ("config", "flags", "root"),
    [
        ("", "", "/var/lib/docker"),
        ('{"data-root": "/srv/docker"}', "", "/srv/docker"),
        ('{"data-root": "/srv/docker"}', "dockerd --data-root=/mnt/d -H fd://", "/mnt/d"),
        ("{}", "dockerd --data-root /mnt/d", "/mnt/d"),
    ],
)
def test_data_root(config: str, flags: str, root: str) -> None:
    assert str(data_root_of(config, flags)) == root


def test_what_cannot_be_read_of_a_container_is_left_out(tmp_path: Path) -> None:
    for name, text in (("a", '{"PortBindings": {}}'), ("b", "{"), ("c", "[]")):
        (tmp_path / "containers" / name).mkdir(parents=True)
        (tmp_path / "containers" / name / "hostconfig.json").write_text(text)
    (tmp_path / "containers/d").mkdir()
    assert list(docker_user._host_configs(tmp_path)) == [{"PortBindings": {}}]
    assert list(docker_user._host_configs(tmp_path / "none")) == []


def test_data_on_another_disk_is_read_through_the_link(tmp_path: Path) -> None:
    folder = tmp_path / "disk/docker/containers/a"
    folder.mkdir(parents=True)
    (folder / "hostconfig.json").write_text('{"PortBindings": {}}')
    (tmp_path / "docker").symlink_to(tmp_path / "disk/docker")
    assert list(docker_user._host_configs(tmp_path / "docker")) == [{"PortBindings": {}}]
    # No container, and nothing that Docker minds.
    (folder.parent / "notes").write_text("somebody's")
    assert len(list(docker_user._host_configs(tmp_path / "docker"))) == 1


@pytest.mark.parametrize("kind", ["writable by others", "a link below", "no directory"])
def test_containers_that_cannot_be_read_are_not_none(tmp_path: Path, kind: str) -> None:
    unreadable(tmp_path, kind)
    with pytest.raises(HostFileError):
        list(docker_user._host_configs(tmp_path))


def unreadable(root: Path, kind: str = "writable by others") -> None:
    """Docker's data, with one container that publishes 9090."""
    folder = root / "containers/a"
    folder.mkdir(parents=True)
    text = '{"PortBindings": {"80/tcp": [{"HostIp": "", "HostPort": "9090"}]}}'
    (folder / "hostconfig.json").write_text(text)
    if kind == "writable by others":
        folder.chmod(0o777)
    elif kind == "a link below":
        folder.rename(root / "a")
        folder.symlink_to(root / "a")
    else:
        folder.parent.rename(root / "elsewhere")
        folder.parent.write_text("")


class Kernel:
    """Its tables, as iptables shows them and iptables-restore changes them."""

    def __init__(self) -> None:
        self.tables: dict[str, list[str]] = {"mangle": [], "filter": []}

    def show(self, argv: list[str], *, timeout: float) -> str:
        return "".join(f"{rule}\n" for rule in self.tables[argv[argv.index("-t") + 1]])

    def restore(self, argv: list[str], *, stdin: str, timeout: float = 30) -> Done:
        table, chain, *rest, commit = stdin.splitlines()
        assert commit == "COMMIT"
        name = chain.removeprefix(":").split()[0]
        kept = [rule for rule in self.tables[table[1:]] if not rule.startswith(f"-A {name} ")]
        for line in rest:
            verb, origin, *words = line.split()
            if verb == "-A":
                kept.append(line)
            elif verb == "-D":
                kept.remove(" ".join(["-A", origin, *words]))
            elif verb == "-I":
                kept.insert(0, " ".join(["-A", origin, *words[1:]]))
        self.tables[table[1:]] = kept
        return Done(0, "", "")


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Of a host whose Docker keeps its data below `tmp_path`."""
    kernel = Kernel()
    monkeypatch.setattr(docker_user, "_daemon_json", lambda: json.dumps({"data-root": str(tmp_path)}))
    monkeypatch.setattr(docker_user, "_command_line", lambda: "")
    monkeypatch.setattr(docker_user, "_programs", lambda: ("iptables",))
    monkeypatch.setattr(docker_user, "output_of", kernel.show)
    monkeypatch.setattr(docker_user, "run", kernel.restore)
    return kernel


def test_the_chains_come_up_also_where_published_ports_are_not_known(
    kernel: Kernel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """docker.service requires the unit. That they are not known is said, and no look at it calls it fine."""
    unreadable(tmp_path)
    assert main(["docker-user"]) == 0
    said = capsys.readouterr().out
    assert "the ports that containers publish are not known: " in said
    assert "can be written by others (mode 0777)" in said
    for place in PLACES:
        assert problems(place, "\n".join(kernel.tables[place.table])) == []
    assert main(["docker-user", "--check"]) == 3
    with pytest.raises(HostFileError):
        docker_user.faults()


def test_a_port_that_was_closed_stays_closed_while_ports_are_not_known(
    kernel: Kernel, tmp_path: Path
) -> None:
    ports = [Port("tcp", "8000:8010"), Port("udp", "53")]
    foreign = f"-A {INPUT.chain} -p tcp -m tcp --dport 25 -j DROP"
    kernel.tables["mangle"] = [*rules(INPUT, ports), foreign]
    unreadable(tmp_path)
    assert main(["docker-user"]) == 0
    assert problems(INPUT, "\n".join(kernel.tables["mangle"]), ports) == []
    (tmp_path / "containers/a").chmod(0o755)
    assert main(["docker-user"]) == 0
    assert problems(INPUT, "\n".join(kernel.tables["mangle"]), [Port("tcp", "9090")]) == []
    assert main(["docker-user", "--check"]) == 0


def test_rules_of_others_stay_behind_ours_and_are_named() -> None:
    theirs = '-A DOCKER-USER -s 192.0.2.1/32 -m comment --comment "not quietport at all" -j ACCEPT'
    text = listing([theirs, *GOOD, "-A DOCKER-USER -j RETURN"], [])
    assert foreign_rules(FILTER, text) == [theirs]
    lines = restore_text(FILTER, text).splitlines()
    assert lines.index(theirs) > lines.index(GOOD[-1])
    assert lines.count(GOOD[0]) == 1


def test_a_jump_that_is_not_first_is_moved_in_the_same_commit() -> None:
    lines = restore_text(FILTER, listing(GOOD, ["-A FORWARD -j DOCKER-FORWARD", JUMP])).splitlines()
    assert lines[-3:] == ["-D FORWARD -j DOCKER-USER", "-I FORWARD 1 -j DOCKER-USER", "COMMIT"]
    assert lines.count("COMMIT") == 1


@pytest.mark.parametrize(
    ("config", "flags", "backend"),
    [
        ("", "", "iptables"),
        ("{}", "dockerd -H fd://", "iptables"),
        ('{"iptables": true, "ip6tables": false}', "", "iptables"),
        ('{"iptables": false}', "", "none"),
        ("", "dockerd --iptables=false", "none"),
        ('{"firewall-backend": "nftables"}', "", "nftables"),
        ("", "dockerd --firewall-backend nftables", "nftables"),
        ("", "dockerd --firewall-backend=nftables", "nftables"),
        ('{"firewall-backend": "iptables"}', "", "iptables"),
    ],
)
def test_backend(config: str, flags: str, backend: str) -> None:
    assert backend_of(config, flags) == backend
    assert bool(docker_user.refusal(backend)) == (backend != "iptables")


@pytest.mark.parametrize("config", ["{", "[]", "null", "\x00"])
def test_a_configuration_that_cannot_be_read_is_not_taken_for_iptables(config: str) -> None:
    with pytest.raises(HostProgramError):
        backend_of(config)


def test_refusal_changes_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(docker_user, "_daemon_json", lambda: '{"iptables": false}')
    monkeypatch.setattr(docker_user, "_command_line", lambda: "")
    monkeypatch.setattr(docker_user, "_settle", lambda *_: pytest.fail("rules were touched"))
    assert main(["docker-user"]) == 1
    assert "iptables" in capsys.readouterr().err


def test_a_table_that_cannot_be_changed_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def refuse(argv: list[str], *, stdin: str = "", timeout: float = 30) -> Done:
        tried.append(stdin)
        return Done(code=1, out="", err="iptables-restore: line 9 failed\n")

    monkeypatch.setattr(docker_user, "run", refuse)
    monkeypatch.setattr(docker_user, "output_of", lambda argv, timeout: "-P FORWARD ACCEPT\n")
    (first, _) = docker_user._settle("iptables", FILTER)
    assert len(tried) == docker_user.ATTEMPTS
    assert "line 9 failed" in first


# --- packets --------------------------------------------------------------------------------------

_MISSING = [name for name in ("iptables", "ip6tables", "ip", "unshare") if shutil.which(name) is None]
needs_namespaces = pytest.mark.skipif(
    (os.geteuid() != 0 or bool(_MISSING)) and os.environ.get("CI") != "true",
    reason=f"network namespaces need root and iptables, iproute2, util-linux (missing: {_MISSING or 'root'})",
)

# A host between the public side, the tailnet, and a container on docker0. The tailnet and the public side are
# namespaces behind a veth; the container's port is reached at its own address, as a neighbour that routes
# there does, and as Docker's DNAT leaves it when a packet gets to FORWARD.
_WORLD = """
set -e
mount -t tmpfs none /run
mount -t tmpfs none /etc/docker 2>/dev/null || true
mount -t tmpfs none /var/lib
mkdir -p /var/lib/docker/containers/1
ip link set lo up
ip link add docker0 type bridge
ip addr add 172.30.0.1/24 dev docker0
ip -6 addr add fd30::1/64 dev docker0 nodad
ip link set docker0 up
echo 1 > /proc/sys/net/ipv4/ip_forward
echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
place() {
  ip netns add "$1"
  ip link add "$2" type veth peer name eth0 netns "$1"
  ip -n "$1" link set lo up
  ip -n "$1" link set eth0 up
  ip -n "$1" addr add "$3.2/24" dev eth0
  ip -n "$1" -6 addr add "$4::2/64" dev eth0 nodad
  ip -n "$1" route add default via "$3.1"
  ip -n "$1" -6 route add default via "$4::1"
  ip link set "$2" up
}
place public eth9 172.31.0 fd31
ip addr add 172.31.0.1/24 dev eth9; ip -6 addr add fd31::1/64 dev eth9 nodad
place tailnet tailscale0 172.32.0 fd32
ip addr add 172.32.0.1/24 dev tailscale0; ip -6 addr add fd32::1/64 dev tailscale0 nodad
place container vethc 172.30.0 fd30
ip link set vethc master docker0
"""
_SERVE = """
import socket, sys
sockets = [socket.create_server(("", 8080)), socket.create_server(("::", 8080), family=socket.AF_INET6)]
print("ready", flush=True)
sys.stdin.read()
"""
_CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 8080), timeout=1).close()
except OSError:
    sys.exit(1)
"""


class World:
    """A shell in namespaces of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        inside = ["nsenter", "-t", str(self.process.pid), "-n", "-m", "--", *argv]
        return subprocess.run(inside, capture_output=True, text=True, cwd=ROOT, check=False)

    def docker_user(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "quietport", "docker-user", *arguments)

    def reaches(self, place: str, address: str) -> bool:
        return self.run("ip", "netns", "exec", place, sys.executable, "-c", _CONNECT, address).returncode == 0


CONTAINER = ("172.30.0.2", "fd30::2")
PUBLIC = ("172.31.0.2", "fd31::2")


@pytest.fixture
def world() -> Iterator[World]:
    with subprocess.Popen(
        ["unshare", "--net", "--mount", "sh", "-c", "echo ready; cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as shell:
        assert shell.stdout is not None
        shell.stdout.readline()
        made = World(shell)
        built = made.run("sh", "-c", _WORLD)
        servers = []
        try:
            assert built.returncode == 0, built.stderr
            for place in ("container", "public"):
                argv = ["nsenter", "-t", str(shell.pid), "-n", "-m", "--", "ip", "netns", "exec", place]
                server = subprocess.Popen(
                    [*argv, sys.executable, "-c", _SERVE],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                servers.append(server)
                assert server.stdout is not None
                assert server.stdout.readline() == "ready\n"
            # IPv6 takes a moment on new links. This is also the positive control of every test here.
            deadline = time.monotonic() + 20
            while not all(
                made.reaches(place, there) for place in ("public", "tailnet") for there in CONTAINER
            ):
                assert time.monotonic() < deadline, "without the chains the container is not reachable either"
            yield made
        finally:
            for server in servers:
                server.communicate("")
            if shell.stdin is not None:
                shell.stdin.close()


@needs_namespaces
def test_the_public_side_is_kept_away_and_the_tailnet_is_not(world: World) -> None:
    assert world.docker_user("--check").returncode == 1
    done = world.docker_user()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [world.reaches("public", address) for address in CONTAINER] == [False, False]
    assert [world.reaches("tailnet", address) for address in CONTAINER] == [True, True]
    assert [world.reaches("container", address) for address in PUBLIC] == [True, True]
    before = world.run("iptables-save", "-c").stdout
    assert world.docker_user("--check").returncode == 0
    assert world.docker_user().returncode == 0
    assert _without_comments(world.run("iptables-save", "-c").stdout) == _without_comments(before)


def _without_comments(text: str) -> list[str]:
    """Rules alone; iptables-save dates its comments, and counters move by themselves."""
    return [line.partition("] ")[2] for line in text.splitlines() if line.startswith("[")]


HOST = ("172.31.0.1", "fd31::1", "172.32.0.1", "fd32::1")
# What docker-proxy is: a program of the host that listens on every address.
_PROXY = f"""
python3 -c '{_SERVE.replace("sys.stdin.read()", "import time; time.sleep(100)")}' >/run/ready 2>&1 &
echo $! >/run/pid
until grep -q ready /run/ready; do sleep 0.1; done
"""


@needs_namespaces
def test_what_a_container_publishes_through_a_program_of_the_host_is_kept_away(world: World) -> None:
    """And nothing else of the host: which of its own ports are open is the firewall's business."""
    assert world.run("sh", "-ec", _PROXY).returncode == 0
    assert world.docker_user().returncode == 0
    assert [world.reaches("public", address) for address in HOST[:2]] == [True, True], "no container's port"
    publish = '{"PortBindings": {"80/tcp": [{"HostIp": "", "HostPort": "8080"}]}}'
    world.run("sh", "-c", f"echo '{publish}' >/var/lib/docker/containers/1/hostconfig.json")
    assert world.docker_user("--check").returncode == 1
    assert world.docker_user().returncode == 0
    assert world.docker_user("--check").returncode == 0
    assert [world.reaches("public", address) for address in HOST[:2]] == [False, False]
    assert [world.reaches("tailnet", address) for address in HOST[2:]] == [True, True]
    assert [world.reaches("container", address) for address in ("172.30.0.1", "fd30::1")] == [True, True]
    world.run("rm", "/var/lib/docker/containers/1/hostconfig.json")
    assert world.docker_user().returncode == 0
    assert world.reaches("public", HOST[1])
    assert world.run("sh", "-c", "kill $(cat /run/pid)").returncode == 0


@needs_namespaces
@pytest.mark.parametrize("family", ["iptables", "ip6tables"])
def test_no_gap_while_docker_moves_its_jump(world: World, family: str) -> None:
    """Between Docker's delete and its insert the table filter lets everything pass; mangle does not."""
    assert world.docker_user().returncode == 0
    assert world.run(family, "-D", "FORWARD", "-j", "DOCKER-USER").returncode == 0
    assert not world.reaches("public", CONTAINER[family == "ip6tables"])
    # Positive control: it is the chain in mangle that keeps it away.
    world.run(family, "-t", "mangle", "-F", "FORWARD")
    assert world.reaches("public", CONTAINER[family == "ip6tables"])
    assert world.docker_user("--check").returncode == 1
    assert world.docker_user().returncode == 0
    assert world.docker_user("--check").returncode == 0
    assert not world.reaches("public", CONTAINER[family == "ip6tables"])


@needs_namespaces
def test_chains_that_are_there_already(world: World) -> None:
    """As an older Docker leaves them: its own rules above, a stranger's exception, its RETURN at the end."""
    for command in (
        "iptables -N DOCKER-USER",
        "iptables -A DOCKER-USER -s 172.31.0.2 -j ACCEPT",
        "iptables -A DOCKER-USER -j RETURN",
        "iptables -A FORWARD -j DOCKER-USER",
        "iptables -I FORWARD -o docker0 -j ACCEPT",
    ):
        assert world.run(*command.split()).returncode == 0
    done = world.docker_user()
    assert done.returncode == 0
    assert "172.31.0.2" in done.stdout
    assert not world.reaches("public", CONTAINER[0])
    saved = world.run("iptables", "-S").stdout.splitlines()
    assert saved.index(JUMP) < saved.index("-A FORWARD -o docker0 -j ACCEPT")
    assert saved.index(GOOD[-1]) < saved.index("-A DOCKER-USER -s 172.31.0.2/32 -j ACCEPT")
    assert world.docker_user("--check").returncode == 0
