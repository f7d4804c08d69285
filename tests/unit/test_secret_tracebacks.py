"""An error nobody foresaw, with a secret at hand: pyinfra prints it and keeps it in pyinfra-debug.log."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CANARY = "canary-4711"
# In a process of its own: pyinfra's command line patches the standard library.
PROGRAM = """
import sys
from pyinfra_cli.cli import cli
import control.connector
from control.secret import resolve

def open_session(name):
    secret = resolve("env:QPT_CANARY", what=name)
    plain = secret.reveal().decode()
    raise RuntimeError(f"boom {secret} {[secret]!r} {len(plain)}")

control.connector.open_session = open_session
cli(sys.argv[1:])
"""


def test_neither_the_output_nor_the_log_shows_the_secret(tmp_path: Path) -> None:
    (tmp_path / "hosts.toml").write_text('[hosts.vps1]\naddress = "192.0.2.1"\n')
    argv = [sys.executable, "-c", PROGRAM, str(ROOT / "inventory"), "exec", "--debug-all", "-y", "--", "true"]
    env = {**os.environ, "QUIETPORT_HOSTS": str(tmp_path / "hosts.toml"), "QPT_CANARY": CANARY}
    done = subprocess.run(
        argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    log = (tmp_path / "pyinfra-debug.log").read_text()
    for said in (done.stdout + done.stderr, log):
        # The error itself is there, with what was at hand.
        assert f"boom <Secret from env> [<Secret from env>] {len(CANARY)}" in said
        assert CANARY not in said
    assert done.returncode != 0
