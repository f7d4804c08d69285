"""Programs this side starts do not get the variables that secrets come from; what else is set they get."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from control import peers, secret
from control.proxy import Proxy
from control.secret import check_source, child_environment, resolve
from control.settings import parse_fleet

SHOW = 'import os; print({k: v for k, v in os.environ.items() if k.startswith("QPT_")})'


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret, "_variables", set())
    monkeypatch.setenv("QPT_CANARY", "canary-4711")
    monkeypatch.setenv("QPT_ELSE", "control-4712")


def test_a_variable_that_no_source_names_stays() -> None:
    assert child_environment() == dict(os.environ)
    check_source("env:QPT_CANARY")
    assert "QPT_CANARY" not in child_environment()
    assert child_environment()["QPT_ELSE"] == "control-4712"
    assert os.environ["QPT_CANARY"] == "canary-4711"


def test_every_source_of_a_hosts_file_counts() -> None:
    names = [f"QPT_{letter}" for letter in "ABCD"]
    lines = [
        "[defaults]",
        f'auth_key = "env:{names[0]}"',
        f'sudo_password = "env:{names[1]}"',
        f'login_password = "env:{names[2]}"',
        "[hosts.a]",
        'address = "192.0.2.1"',
        "[hosts.a.secrets]",
        f'"/etc/a/b" = "env:{names[3]}"',
    ]
    parse_fleet("\n".join(lines), file=Path("hosts.toml"))
    assert secret._variables == set(names)


def test_the_command_of_another_secret_does_not_get_it(tmp_path: Path) -> None:
    check_source("env:QPT_CANARY")
    program = tmp_path / "show.py"
    program.write_text(SHOW)
    said = resolve(f"command:{sys.executable} {program}", what="x").reveal().decode()
    assert "canary-4711" not in said
    assert "control-4712" in said


def test_what_carries_the_connection_does_not_get_it() -> None:
    check_source("env:QPT_CANARY")
    proxy = Proxy("vps1", [sys.executable, "-c", SHOW])
    try:
        said = proxy.stream.makefile("r").read()
    finally:
        proxy.close()
    assert "canary-4711" not in said
    assert "control-4712" in said


def test_the_operators_tailscale_does_not_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_source("env:QPT_CANARY")
    label = "import os; label = os.environ.get('QPT_CANARY', os.environ['QPT_ELSE'])\n"
    answer = "{'BackendState': 'Running', 'Peer': {'n': {'HostName': 'vps1', 'DNSName': label}}}"
    program = tmp_path / "tailscale"
    program.write_text(f"#!{sys.executable}\n{label}import json; print(json.dumps({answer}))\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert json.dumps([peer.label for peer in peers.peers("vps1")]) == '["control-4712"]'
