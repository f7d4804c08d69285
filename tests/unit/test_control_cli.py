"""The command line of the operator's side, the inventory's data and the example file."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from control import cli, example, inventory, state
from control.errors import SettingsError
from control.reach import remember_tailnet
from control.settings import HostSettings, parse_fleet
from tests.unit.control_sshd import Operator

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As a person runs it: the installed program."""
    return subprocess.run(
        [str(Path(sys.executable).with_name("quietport")), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd="/",
    )


def test_forget(operator: Operator) -> None:
    operator.host()
    remember_tailnet("vps1", ["100.64.0.3"])
    done = run("forget", "vps1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "vps1: forgot its pinned host key and its tailnet addresses.\n"
    assert state.load("vps1") == state.HostState()
    again = run("forget", "vps1")
    assert (again.returncode, again.stdout) == (0, "vps1: nothing was remembered.\n")


def test_forget_a_host_that_left_the_file(operator: Operator) -> None:
    operator.host(name="old")
    remember_tailnet("old", ["100.64.0.3"])
    operator.host(name="new")
    assert run("forget", "old").returncode == 0


def test_an_unknown_host_is_named_with_the_nearest(operator: Operator) -> None:
    operator.host()
    done = run("forget", "vsp1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("no host called 'vsp1'. Did you mean vps1?\n")
    assert run("ssh-config", "vsp1").returncode == 1


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "a/b", ".lock"])
def test_a_name_is_never_a_path(operator: Operator, name: str) -> None:
    operator.host()
    assert run("forget", name).returncode == 1


def test_ssh_config_prints_a_path(operator: Operator) -> None:
    operator.host()
    done = run("ssh-config")
    assert done.returncode == 0
    assert "Host vps1" in Path(done.stdout.strip()).read_text()


def test_errors_are_a_sentence_on_standard_error(operator: Operator) -> None:
    operator.hosts("[")
    for arguments in (["forget", "vps1"], ["ssh-config"]):
        done = run(*arguments)
        assert done.returncode == 1
        assert done.stdout == ""
        assert "not TOML" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [[], ["forget"], ["nonsense"], ["forget", "a", "b"], ["--nonsense"]])
def test_usage(arguments: list[str]) -> None:
    assert run(*arguments).returncode == 2


def test_version() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("quietport 0.")


def test_a_reader_that_leaves_early_is_no_error() -> None:
    program = Path(sys.executable).with_name("quietport")
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; for n in 1 2 3; do {program} example | true; done"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


class Gone(io.TextIOWrapper):
    """Standard output of a program whose reader has left."""

    def __init__(self) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        super().__init__(os.fdopen(writer, "wb"))


@pytest.mark.parametrize(
    ("verb", "said", "expected"),
    # What does not fit into the buffer breaks off before the answer is known.
    [("doctor", "x", 3), ("doctor", "x" * 100_000, 1), ("ports", "x", 3), ("example", "", 0)],
)
def test_a_reader_that_leaves_changes_no_answer(
    monkeypatch: pytest.MonkeyPatch, operator: Operator, verb: str, said: str, expected: int
) -> None:
    def answer(names: object, *, as_json: bool) -> int:
        print(said)
        return 3

    operator.host()
    for module in (cli.doctor, cli.ports):
        monkeypatch.setattr(module, "run", answer)
    with Gone() as gone:
        monkeypatch.setattr("sys.stdout", gone)
        assert cli.main([verb]) == expected


@pytest.mark.parametrize(
    ("module", "slow"),
    [("control.cli", "pyinfra"), ("control.converge", "pyinfra_cli"), ("control.dryrun", "pyinfra_cli")],
)
def test_an_interrupt_while_it_loads_is_no_traceback(tmp_path: Path, module: str, slow: str) -> None:
    # The package that takes long, as far as it gets before the interrupt.
    (tmp_path / slow).mkdir()
    interrupt = "import os, sys\nprint('here', file=sys.stderr)\nos.kill(os.getpid(), 2)\n"
    (tmp_path / slow / "__init__.py").write_text(interrupt)
    done = subprocess.run(
        [sys.executable, "-m", module],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd="/",
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "here\n")


def test_after_loading_an_interrupt_is_what_it_was() -> None:
    code = "import control.cli, signal; print(signal.getsignal(2) is signal.default_int_handler)"
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "True\n"


def test_the_example_needs_no_hosts_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIETPORT_HOSTS", str(tmp_path / "nowhere"))
    done = run("example")
    assert (done.returncode, done.stdout) == (0, example.text())


def test_main_returns_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["example"]) == 0
    assert capsys.readouterr().out == example.text()


# --- hosts.example.toml ---


def test_the_file_is_what_the_model_says() -> None:
    file = ROOT / "hosts.example.toml"
    assert file.read_text() == example.text(), "run: quietport example > hosts.example.toml"


def test_it_is_valid_as_it_stands() -> None:
    fleet = parse_fleet(example.text(), file=Path("hosts.toml"))
    assert fleet.hosts["vps1"] == HostSettings(address="203.0.113.7")


def test_it_explains_every_key_and_every_line_in_it_can_be_used() -> None:
    uncommented = re.sub(r"^# (?=[a-z_]+ = )", "", example.text(), flags=re.MULTILINE)
    document = tomllib.loads(uncommented)
    written = {**document["defaults"], **document["hosts"]["vps1"]}
    assert set(written) == set(HostSettings.model_fields)
    # docker_users' sample is a user of agent_users, and so on: all samples go together.
    host = parse_fleet(uncommented, file=Path("/x/hosts.toml")).hosts["vps1"]
    for name, field in HostSettings.model_fields.items():
        assert field.description, name
        assert getattr(host, name) not in (None, (), {}), name


def test_a_commented_line_without_for_example_is_the_default() -> None:
    blocks = example.text().split("\n\n")
    for name, field in HostSettings.model_fields.items():
        (block,) = [part for part in blocks if f"\n# {name} = " in part or f"\n{name} = " in part]
        if "For example" in " ".join(block.replace("#", "").split()) or name == "address":
            continue
        value = tomllib.loads(block.splitlines()[-1].removeprefix("# "))[name]
        default = field.get_default(call_default_factory=True)
        assert value == (list(default) if isinstance(default, tuple) else default), name


# --- inventory ---


def test_the_inventory_is_names_and_plain_data(operator: Operator) -> None:
    operator.hosts(
        '[defaults]\nauth_key = "env:KEY"\n'
        '[hosts.vps1]\naddress = "192.0.2.1"\n[hosts.vps2]\naddress = "192.0.2.2"\n'
    )
    hosts = inventory.hosts()
    assert [name for name, _ in hosts] == ["@quietport/vps1", "@quietport/vps2"]
    assert json.loads(json.dumps(hosts))[0][1] == hosts[0][1] | {}
    assert hosts[0][1]["quietport"]["auth_key"] == "env:KEY"


def test_no_secret_is_in_the_inventory(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "canary")
    operator.host(auth_key="env:KEY", sudo_password="env:KEY", login_password="env:KEY")
    assert "canary" not in repr(inventory.hosts())
    assert "env:KEY" in repr(inventory.hosts())


@pytest.mark.parametrize(
    "text", ["", "[hosts]", "[defaults]", "[hosts.a]", "hosts = 1", "\x00", "[hosts.A]\naddress='x'"]
)
def test_a_file_without_usable_hosts_is_our_error(operator: Operator, text: str) -> None:
    operator.hosts(text)
    with pytest.raises(SettingsError):
        inventory.hosts()


def test_the_inventory_file_defines_one_group() -> None:
    names = [
        line.partition(" = ")[0] for line in (ROOT / "inventory").read_text().splitlines() if " = " in line
    ]
    assert names == ["hosts"]
