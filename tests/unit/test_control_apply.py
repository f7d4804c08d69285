"""`quietport apply`, pyinfra under it, against a real sshd: 0 only when every chosen host converged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from control import inventory
from control.errors import SettingsError
from control.settings import GROUPS
from tests.unit.control_sshd import NEEDS_ROOT, Operator, Server, free_port

ROOT = Path(__file__).parents[2]
TWO = '[hosts.vps1]\naddress = "192.0.2.1"\n[hosts.vps2]\naddress = "192.0.2.2"\n'


def quietport(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("quietport")
    return subprocess.run(
        [program, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )


# --- before anything is reached ---


def test_an_unknown_host_is_named_with_the_nearest(operator: Operator) -> None:
    operator.hosts(TWO)
    done = quietport("apply", "vps1", "vsp2")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"quietport: {operator.hosts_file}: no host called 'vsp2'. Did you mean vps2?\n"


@pytest.mark.parametrize("text", ["", "[defaults]\nuser = 'root'\n", "[hosts]\n"])
def test_no_host_is_an_error(operator: Operator, text: str) -> None:
    operator.hosts(text)
    done = quietport("apply")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no host in it. Add [hosts.NAME] with an address." in done.stderr


def test_without_its_deploys_it_says_where_it_looked(tmp_path: Path, operator: Operator) -> None:
    operator.hosts(TWO)
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed/control").symlink_to(ROOT / "control")
    code = "import control; control.__file__ = {!r}; from control import apply; apply.checkout()".format(
        str(tmp_path / "installed/control2/__init__.py")
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"{tmp_path}/installed/inventory is not there" in done.stderr


# --- pyinfra's own --limit and --exclude ---


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"limit": ("vsp1",)}, "--limit vsp1 matches no host. Did you mean vps1? There are vps1, vps2."),
        ({"limit": ("vps1", "db*")}, "--limit db* matches no host"),
        ({"exclude": ("vsp1",)}, "--exclude vsp1 matches no host. Did you mean vps1?"),
        ({"limit": ("vps1",), "exclude": ("vps*",)}, "--limit and --exclude leave no host"),
        ({"exclude": ("hosts",)}, "--limit and --exclude leave no host"),
    ],
)
def test_a_choice_that_matches_nothing(
    operator: Operator, options: dict[str, tuple[str, ...]], sentence: str
) -> None:
    operator.hosts(TWO)
    with pytest.raises(SettingsError) as refused:
        inventory.check_choice(["vps1", "vps2"], options)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"limit": (), "exclude": ()},
        {"limit": ("vps1",)},
        {"limit": ("vps?",), "exclude": ("vps2",)},
        {"limit": ("hosts",)},
        {"limit": ("inventory",), "exclude": ("vps1",)},
    ],
)
def test_a_choice_that_leaves_a_host(operator: Operator, options: dict[str, tuple[str, ...]]) -> None:
    operator.hosts(TWO)
    inventory.check_choice(["vps1", "vps2"], options)


@pytest.mark.parametrize("arguments", [["--limit", "vsp1"], ["--exclude", "vps*"]])
def test_the_literal_command_ends_with_one(operator: Operator, arguments: list[str]) -> None:
    operator.hosts(TWO)
    program = Path(sys.executable).with_name("pyinfra")
    argv = [program, "inventory", "deploys/vps.py", "-y", *arguments]
    done = subprocess.run(
        argv, capture_output=True, text=True, cwd=ROOT, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"quietport: {operator.hosts_file}: --")
    assert "Connecting" not in done.stderr


@pytest.mark.parametrize("name", GROUPS)
def test_no_host_is_called_like_the_group_of_all(operator: Operator, name: str) -> None:
    operator.hosts(f'[hosts.{name}]\naddress = "192.0.2.1"\n')
    with pytest.raises(SettingsError, match=f"--limit {name} means every host"):
        inventory.hosts()


# --- what became of every host ---

DEPLOY = """
from pyinfra.context import host
from pyinfra.operations import server
from operations.common import Commands, operation, refuse

@operation()
def picky(refused) -> Commands:
    if refused:
        yield refuse("no good.")

picky(name="the first step", refused=host.name == "picky")
server.shell(name="the second step", commands=["false" if host.name == "broken" else "true"])
server.shell(name="the third step", commands=["sleep {sleep}; echo third"])
"""


@pytest.fixture
def deploy(tmp_path: Path) -> Path:
    return write_deploy(tmp_path, sleep=0)


def write_deploy(folder: Path, *, sleep: float) -> Path:
    path = folder / "deploys/some.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(DEPLOY.replace("{sleep}", str(sleep)))
    return path


def converge_argv(deploy: Path, *names: str) -> list[str]:
    return [sys.executable, "-P", "-m", "control.converge", str(ROOT / "inventory"), str(deploy), *names]


def converge(deploy: Path, *names: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        converge_argv(deploy, *names),
        capture_output=True,
        text=True,
        cwd=deploy.parent,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def several(operator: Operator, **ports: int) -> None:
    """Hosts that are all this machine: 127.0.0.1, ::1 and so on, at these ports."""
    addresses = iter(("127.0.0.1", "127.0.0.2", "::1", "localhost"))
    operator.hosts(
        '[defaults]\nuser = "root"\n'
        + "".join(f'[hosts.{n}]\naddress = "{next(addresses)}"\nport = {p}\n' for n, p in ports.items())
    )


def closing(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("quietport: ")]


@NEEDS_ROOT
def test_all_converged(operator: Operator, server: Server, deploy: Path) -> None:
    several(operator, one=server.port, two=server.port)
    done = converge(deploy)
    assert done.returncode == 0, done.stderr
    assert closing(done) == [
        "quietport: one converged, 2 changes",
        "quietport: two converged, 2 changes",
    ]
    assert "--> Results:" in done.stderr, "pyinfra's own output is shown"


@NEEDS_ROOT
def test_one_line_for_each_host_that_did_not_converge(
    operator: Operator, server: Server, deploy: Path
) -> None:
    several(operator, well=server.port, picky=server.port, broken=server.port, down=free_port())
    done = converge(deploy)
    assert done.returncode == 1
    well, picky, broken, down = closing(done)
    assert well == "quietport: well converged, 2 changes"
    assert picky == "quietport: picky did not converge: refused: no good. (step: the first step)"
    assert broken.startswith("quietport: broken did not converge: ")
    assert broken.endswith(" (step: the second step)")
    assert down.startswith("quietport: down did not converge: cannot connect to localhost:")
    assert "Traceback" not in done.stderr


@NEEDS_ROOT
def test_only_the_chosen_hosts_count(operator: Operator, server: Server, deploy: Path) -> None:
    several(operator, well=server.port, picky=server.port)
    done = converge(deploy, "well")
    assert (done.returncode, closing(done)) == (0, ["quietport: well converged, 2 changes"])
    done = converge(deploy, "picky")
    assert done.returncode == 1
    assert len(closing(done)) == 1


@NEEDS_ROOT
def test_an_interrupted_run_is_no_success(operator: Operator, server: Server, tmp_path: Path) -> None:
    """pyinfra itself ends with 0 then."""
    several(operator, one=server.port)
    running = subprocess.Popen(
        converge_argv(write_deploy(tmp_path, sleep=30)),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    assert running.stderr is not None
    said = ""
    while "the third step" not in said and (line := running.stderr.readline()):
        said += line
    time.sleep(0.5)
    running.send_signal(signal.SIGINT)
    said += running.communicate(timeout=30)[1]
    assert running.returncode == 130, said
    assert "quietport: one did not converge: the run ended before it was through" in said
    assert "Traceback" not in said


@NEEDS_ROOT
def test_a_mistake_in_the_deploy_is_no_success(operator: Operator, server: Server, tmp_path: Path) -> None:
    several(operator, one=server.port)
    deploy = write_deploy(tmp_path, sleep=0)
    deploy.write_text("1 / 0\n")
    done = converge(deploy)
    assert done.returncode == 1
    assert closing(done) == ["quietport: one did not converge: the run ended before it was through"]


@NEEDS_ROOT
def test_it_works_from_any_directory_and_takes_nothing_from_it(
    operator: Operator, server: Server, deploy: Path, tmp_path: Path
) -> None:
    several(operator, one=server.port)
    for name in ("config.py", "control.py", "pyinfra.py", "json.py"):
        (deploy.parent / name).write_text("raise SystemExit('taken from the working directory')\n")
    assert converge(deploy).returncode == 0


def test_the_hosts_file_beside_the_operator_is_the_one_that_counts(
    operator: Operator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QUIETPORT_HOSTS")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "hosts.toml").write_text(f'[hosts.down]\naddress = "127.0.0.1"\nport = {free_port()}\n')
    done = quietport("apply", cwd=folder)
    assert done.returncode == 1
    first, *_, last = closing(done)
    assert first == f"quietport: converging down of {folder}/hosts.toml"
    assert last.startswith("quietport: down did not converge: cannot connect to 127.0.0.1:")
    assert os.environ.get("QUIETPORT_HOSTS") is None
