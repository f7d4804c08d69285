"""--allow-host against two real sshd: the key opens the one that was named, and not the other."""

from __future__ import annotations

import os
import pwd
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from quietport.sshagent.hosts import is_host
from tests.unit.control_sshd import free_port
from tests.unit.sshagent_world import World, make_key, script, short_folder, wait_until

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="host keys come from a file of root's")
SSHD = "/usr/sbin/sshd"


@dataclass
class Server:
    """An sshd on the loopback that lets one key in."""

    port: int
    host_key: str


@pytest.fixture(scope="module", name="key")
def _key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_key(tmp_path_factory.mktemp("key") / "k")


@pytest.fixture(scope="module", name="servers")
def _servers(tmp_path_factory: pytest.TempPathFactory, key: Path) -> Iterator[list[Server]]:
    if not Path(SSHD).exists():
        pytest.skip("openssh-server is not installed")
    folder = tmp_path_factory.mktemp("sshd")
    # sshd wants its directory, which a machine that never started one does not have.
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    (folder / "authorized").write_text(key.with_suffix(".pub").read_text())
    processes, servers = [], []
    for number in range(2):
        host_key = make_key(folder / f"host{number}", comment="")
        port = free_port()
        config = folder / f"config{number}"
        config.write_text(
            f"ListenAddress 127.0.0.1:{port}\nHostKey {host_key}\nPidFile none\nUsePAM no\nStrictModes no\n"
            f"AuthorizedKeysFile {folder}/authorized\nPasswordAuthentication no\nPermitRootLogin yes\n"
        )
        processes.append(subprocess.Popen([SSHD, "-D", "-e", "-f", str(config)], stderr=subprocess.DEVNULL))
        public = " ".join(host_key.with_suffix(".pub").read_text().split()[:2])
        servers.append(Server(port, public))
    for server in servers:
        wait_until(lambda server=server: answers(server.port))
    yield servers
    for process in processes:
        process.terminate()
        process.wait()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(name="world")
def _world(tmp_path_factory: pytest.TempPathFactory, key: Path) -> World:
    return World(short_folder(tmp_path_factory), key)


def login(server: Server, folder: Path) -> str:
    """A login as whoever runs the tests; the client itself believes every host."""
    user = pwd.getpwuid(os.geteuid()).pw_name
    return (
        f"ssh -F none -p {server.port} -o BatchMode=yes -o StrictHostKeyChecking=no -o LogLevel=ERROR "
        f"-o UserKnownHostsFile={folder}/known-{server.port} {user}@127.0.0.1 echo in-{server.port}"
    )


@AS_ROOT
def test_a_constrained_key_is_of_use_for_the_named_host_alone(world: World, servers: list[Server]) -> None:
    first, second = servers
    known = world.folder / "known"
    known.write_text("".join(f"[127.0.0.1]:{server.port} {server.host_key}\n" for server in servers))
    both = f"{login(first, world.folder)}; {login(second, world.folder)}"
    free = world.run("--", "sh", "-c", both)
    assert free.stdout.split() == [f"in-{first.port}", f"in-{second.port}"]  # the positive control
    words = ("--known-hosts", str(known), "--allow-host", f"[127.0.0.1]:{first.port}")
    bound = world.run(*words, "--", "sh", "-c", f"echo $SSH_AUTH_SOCK >&2; {both}")
    assert bound.stdout.split() == [f"in-{first.port}"]
    # Nor when somebody else uses the socket, or asks the agent for a signature without a host.
    code = f"{login(second, world.folder)}; ssh-keygen -Y sign -n x -f {world.key}.pub {known}; echo done"
    stolen = world.run(*words, "--", "env", "-i", "PATH=/usr/bin:/bin", "sh", "-c", code)
    assert stolen.stdout.split() == ["done"]
    created = [one for one in world.trail().events if one.event == "created"]
    assert [one.more["hosts"] for one in created][1] == [f"[127.0.0.1]:{first.port}"]


@AS_ROOT
def test_for_a_user_and_for_several_hosts(world: World, servers: list[Server]) -> None:
    known = world.folder / "known"
    known.write_text(f"one {servers[0].host_key}\ntwo {servers[1].host_key}\n")
    user = pwd.getpwuid(os.geteuid()).pw_name
    both = "; ".join(login(server, world.folder) for server in servers)
    words = ["--known-hosts", str(known), "--allow-host", f"{user}@one"]
    assert world.run(*words, "--", "sh", "-c", both).stdout.split() == [f"in-{servers[0].port}"]
    everywhere = world.run(*words, "--allow-host", "two", "--", "sh", "-c", both)
    assert len(everywhere.stdout.split()) == 2
    other = world.run("--known-hosts", str(known), "--allow-host", "nobody@one", "--", "sh", "-c", both)
    assert other.stdout == ""


@AS_ROOT
def test_host_keys_come_from_a_file_that_root_alone_can_change(world: World) -> None:
    known = world.folder / "known"
    known.write_text(f"one {world.key.with_suffix('.pub').read_text()}")
    words = ("--known-hosts", str(known), "--allow-host", "one", "--", "true")
    assert world.run(*words).returncode == 0
    absent = world.run("--known-hosts", str(known), "--allow-host", "two", "--", "true")
    assert (absent.returncode, "has no host key of two" in absent.stderr) == (125, True)

    def refused() -> bool:
        done = world.run(*words)
        return (done.returncode, "not trusted" in done.stderr, done.stderr.count("\n")) == (125, True, 1)

    known.chmod(0o666)
    assert refused()
    known.chmod(0o644)
    os.chown(known, 12345, 12345)
    assert refused()
    os.chown(known, 0, 0)
    world.folder.chmod(0o777)
    assert refused()
    world.folder.chmod(0o700)
    assert world.run(*words).returncode == 0
    # A link on the way is resolved once, before the look: what it says later does not matter.
    real = world.folder / "real"
    real.mkdir()
    known.rename(real / "known")
    (world.folder / "link").symlink_to(real)
    seen = world.folder / "seen"
    text = f'echo "$@" >{seen}; exec /usr/bin/ssh-add "$@"'
    world.path.append(script(world.folder / "bin", "ssh-add", text).parent)
    linked = str(world.folder / "link" / "known")
    assert world.run("--known-hosts", linked, *words[2:]).returncode == 0
    assert f"-H {real / 'known'} -" in seen.read_text()
    (real / "known").rename(known)
    moved = known.rename(world.folder / "moved")
    known.symlink_to(moved)
    done = world.run(*words)
    assert (done.returncode, "not followed" in done.stderr) == (125, True)


@AS_ROOT
def test_an_ssh_add_that_knows_no_constraints(world: World) -> None:
    known = world.folder / "known"
    known.write_text(f"one {world.key.with_suffix('.pub').read_text()}")
    text = "echo 'ssh-add: unknown option -- h' >&2; exit 1"
    world.path.append(script(world.folder / "bin", "ssh-add", text).parent)
    done = world.run("--known-hosts", str(known), "--allow-host", "one", "--", "true")
    assert (done.returncode, "needs OpenSSH 8.9 or newer" in done.stderr) == (125, True)


def test_names_of_hosts() -> None:
    for name in ("h", "h.example", "root@h", "192.0.2.1", "2001:db8::1", "[h]:2222", "u@[2001:db8::1]:22"):
        assert is_host(name), name
    for name in ("", "-h", "a b", "a>b", "@h", "u@", "-u@h", "h\n", "h;x", "[h]", "[h]:x", "u@-h"):
        assert not is_host(name), name
