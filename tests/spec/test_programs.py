"""The host programs: installed for root, and the same source as the operator's."""

from __future__ import annotations

import hashlib
import json

from control.settings import HostSettings
from control.zipapp import build
from facts.files import FileState, FileText
from tests.spec.reading import Reading

ZIPAPP = "/usr/local/lib/quietport/quietport.pyz"
LAUNCHER = "/usr/local/sbin/quietport"
HOST_FILE = "/etc/quietport/host.json"


def test_the_program_is_the_operators_own_build(reading: Reading) -> None:
    state = reading.fact(FileState, ZIPAPP)
    assert state["sha256"] == hashlib.sha256(build()).hexdigest()
    assert (state["user"], state["group"], state["mode"]) == ("root", "root", "0644")


def test_the_launcher_runs(reading: Reading) -> None:
    assert reading.fact(FileState, LAUNCHER)["mode"] == "0755"
    assert "ports" in reading.text(f"{LAUNCHER} --help")


def test_host_json_says_what_was_declared(reading: Reading, settings: HostSettings) -> None:
    declared = json.loads(reading.fact(FileText, HOST_FILE))
    assert (declared["schema"], declared["name"]) == (1, reading.name)


def test_host_json_names_no_secret(reading: Reading, settings: HostSettings) -> None:
    text = reading.fact(FileText, HOST_FILE)
    sources = [settings.auth_key, settings.sudo_password, settings.login_password, *settings.secrets.values()]
    assert [source for source in sources if source and source in text] == []
