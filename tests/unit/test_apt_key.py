"""A repository's signing key: what a host is offered, and that no other than the pinned one is taken."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from control.settings import HostSettings
from deploys.preflight import repositories, trust_problem
from facts import apt as apt_facts
from facts.apt import OfferedKey, dearmored, primary_fingerprints
from operations import apt

# An Ed25519 key made for this test with gpg 2.2.40; its fingerprint and its armor as gpg printed them.
KEY = bytes.fromhex(
    "9833046b013d8016092b06010401da470f010107402b593665e67aa"
    "e419caa5d1158983e242165737ee2c93eb6dd68beb94364644d"
)
FINGERPRINT = "E2234ACEF01AE3043F28F11F932816EDDF4A6B30"
ARMORED = b"""-----BEGIN PGP PUBLIC KEY BLOCK-----
Comment: for a test

mDMEawE9gBYJKwYBBAHaRw8BAQdAK1k2ZeZ6rkGcql0RWJg+JCFlc37iyT623Wi+
uUNkZE0=
=e9tE
-----END PGP PUBLIC KEY BLOCK-----
"""
OTHER = "0" * 40
SYSTEM = {"distribution": "debian", "codename": "trixie"}
PAGES = {"/binary": KEY, "/armored": ARMORED, "/page": b"<html>Not here</html>", "/empty": b""}


class _Pages(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/trickle":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(300):
                    self.wfile.write(b"x")
                    time.sleep(0.1)
            return
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/armored")
            self.end_headers()
            return
        self.send_response(200 if self.path in PAGES else 404)
        self.end_headers()
        self.wfile.write(PAGES.get(self.path, b""))

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site() -> Iterator[str]:
    """The address of a server with the pages."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Pages) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(params=["curl", "python3"])
def programs(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """An environment in which the shell finds one program that can fetch, and what every Debian has."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in (request.param, "sh", "sed", "head", "base64", "timeout"):
        path = sys.executable if name == "python3" else shutil.which(name)
        if path is None:
            pytest.skip(f"no {name} here")
        # No link: python3 finds its library beside itself.
        (folder / name).write_text(f'#!/bin/sh\nexec {path} "$@"\n')
        (folder / name).chmod(0o755)
    return {"PATH": str(folder)}


def offered(url: str, keyring: Path, environment: dict[str, str]) -> list[str]:
    """What the fact says of a host that has these programs."""
    fact = OfferedKey()
    done = subprocess.run(
        ["/bin/sh", "-c", fact.command(url, str(keyring))], capture_output=True, env=environment, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    return fact.process(done.stdout.decode().split("\n")[:-1])


@pytest.mark.parametrize(
    ("page", "fingerprints"),
    [
        ("/binary", [FINGERPRINT]),
        ("/armored", [FINGERPRINT]),
        ("/moved", [FINGERPRINT]),
        ("/page", []),
        ("/empty", []),
        ("/nothing", []),
    ],
)
def test_the_key_that_is_offered(
    site: str, programs: dict[str, str], tmp_path: Path, page: str, fingerprints: list[str]
) -> None:
    assert offered(site + page, tmp_path / "none.gpg", programs) == fingerprints


def test_nobody_asks_a_server_once_there_is_a_keyring(
    site: str, programs: dict[str, str], tmp_path: Path
) -> None:
    keyring = tmp_path / "it's there.gpg"
    keyring.touch()
    assert offered(f"{site}/binary", keyring, programs) == []


def test_a_server_that_never_ends_is_not_waited_for(
    site: str, programs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apt_facts, "_FETCH", apt_facts._FETCH.replace("15", "1"))
    began = time.monotonic()
    assert offered(f"{site}/trickle", tmp_path / "none.gpg", programs) == []
    assert time.monotonic() - began < 15


def test_a_server_that_is_not_there_tells_nothing(programs: dict[str, str], tmp_path: Path) -> None:
    assert offered("http://127.0.0.1:9/key", tmp_path / "none.gpg", programs) == []


def test_armor_is_taken_off() -> None:
    assert dearmored(ARMORED) == KEY == dearmored(KEY)
    assert primary_fingerprints(dearmored(ARMORED.replace(b"\n", b"\r\n"))) == [FINGERPRINT]
    with pytest.raises(ValueError, match="blank line"):
        dearmored(b"-----BEGIN PGP PUBLIC KEY BLOCK-----")


def test_another_key_is_refused_with_the_settings_to_correct() -> None:
    repository = repositories(HostSettings(address="192.0.2.1", tailscale_key_fingerprint=OTHER), SYSTEM)[-1]
    assert trust_problem(repository, [FINGERPRINT]) == (
        "the key at https://pkgs.tailscale.com/stable/debian/trixie.noarmor.gpg has the fingerprint "
        f"{FINGERPRINT}, and tailscale_key_fingerprint says {OTHER}: not trusted. Compare with what upstream "
        "publishes, then correct tailscale_repository or tailscale_key_fingerprint."
    )
    assert trust_problem(repository, [OTHER]) is None
    assert trust_problem(repository, []) is None, "it cannot be told yet"
    assert trust_problem(repository, [OTHER, FINGERPRINT]) is not None, "one key beside the pinned one"


def test_only_the_repositories_that_are_used_are_looked_at() -> None:
    for source, names in (("docker", ["docker", "tailscale"]), ("none", ["tailscale"])):
        found = repositories(HostSettings(address="192.0.2.1", docker_source=source), SYSTEM)
        assert [repository.name for repository in found] == names
    for repository in found:
        assert {f"{repository.name}_repository", f"{repository.name}_key_fingerprint"} <= set(
            HostSettings.model_fields
        )


@pytest.mark.skipif(
    os.geteuid() != 0 or not (shutil.which("gpg") and shutil.which("curl")),
    reason="runs what a host runs: as root, with gpg and curl",
)
@pytest.mark.parametrize("page", ["/binary", "/armored"])
def test_the_script_takes_the_pinned_key_and_no_other(site: str, tmp_path: Path, page: str) -> None:
    def fetch(wanted: str) -> subprocess.CompletedProcess[str]:
        said = "the key has FOUND, x_key_fingerprint says otherwise."
        argv = ["sh", "-c", apt._KEY, "sh", site + page, wanted, str(keyring), said]
        return subprocess.run(argv, capture_output=True, text=True, check=False)

    keyring = tmp_path / "keyrings/x.gpg"
    refused = fetch(OTHER)
    assert refused.returncode == 1
    assert refused.stderr == f"refused: the key has {FINGERPRINT}, x_key_fingerprint says otherwise.\n"
    assert not keyring.parent.exists()
    done = fetch(FINGERPRINT)
    assert done.returncode == 0, done.stderr
    assert keyring.read_bytes() == KEY


def test_the_armored_key_is_the_same_key() -> None:
    body = ARMORED.split(b"\n\n")[1].split(b"=e9tE")[0]
    assert base64.b64decode(body) == KEY
