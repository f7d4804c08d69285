"""What the operator's side remembers: private, whole, and apart for each hosts file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from control import state
from control.errors import QuietportError, ReachError
from control.reach import remember_tailnet
from tests.unit.control_sshd import Operator


def test_what_is_remembered_is_read_again(operator: Operator) -> None:
    operator.host()
    wanted = state.HostState(
        tailnet_addresses=("100.64.0.3",), tailnet_port=22, host_keys=("ssh-ed25519 AAAA",)
    )
    state.update("vps1", lambda _: wanted)
    assert state.load("vps1") == wanted
    assert state.remembered() == ["vps1"]


def test_it_is_private(operator: Operator) -> None:
    operator.host()
    remember_tailnet("vps1", ["100.64.0.3"])
    directory = state.directory()
    assert directory.stat().st_mode & 0o777 == 0o700
    for path in directory.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600, path


def test_a_directory_others_can_write_is_refused(operator: Operator) -> None:
    operator.host()
    directory = state.directory()
    directory.chmod(0o770)
    with pytest.raises(ReachError, match="others can change"):
        state.load("vps1")
    directory.chmod(0o700)
    assert state.load("vps1") == state.HostState()


def test_two_hosts_files_share_nothing(operator: Operator, tmp_path: Path) -> None:
    operator.host()
    remember_tailnet("vps1", ["100.64.0.3"])
    other = tmp_path / "other.toml"
    assert state.state_dir(other) != state.state_dir(operator.hosts_file)


def test_the_same_file_by_another_path_is_the_same(operator: Operator, tmp_path: Path) -> None:
    operator.host()
    link = tmp_path / "link.toml"
    link.symlink_to(operator.hosts_file)
    assert state.state_dir(link) == state.state_dir(operator.hosts_file)


def test_where_it_is(tmp_path: Path) -> None:
    file = tmp_path / "hosts.toml"
    assert state.state_dir(file, {"QUIETPORT_STATE": "/s"}).parent == Path("/s")
    assert state.state_dir(file, {"XDG_STATE_HOME": "/x"}).parent == Path("/x/quietport")
    assert state.state_dir(file, {}).parent == Path.home() / ".local/state/quietport"
    (tmp_path / "lab.json").write_text("{}")
    assert state.state_dir(file, {"QUIETPORT_STATE": "/s"}) == tmp_path / "operator"


def test_forgetting_takes_everything_of_one_host_and_nothing_of_others(operator: Operator) -> None:
    operator.hosts('[hosts.vps1]\naddress = "192.0.2.1"\n[hosts.vps2]\naddress = "192.0.2.2"\n')
    for name in ("vps1", "vps2"):
        remember_tailnet(name, ["100.64.0.3"])
    assert state.forget("vps1")
    assert not state.forget("vps1")
    assert state.load("vps1") == state.HostState()
    assert state.load("vps2").tailnet_addresses == ("100.64.0.3",)
    assert not [path for path in state.directory().iterdir() if path.name.startswith("vps1")]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"schema": 2}', "[" * 100000, '{"schema": 1, "tailnet_addresses": ["x"]}'],
)
def test_a_damaged_file_is_one_sentence_and_can_be_forgotten(operator: Operator, text: str) -> None:
    operator.host()
    (state.directory() / "vps1.json").write_text(text)
    with pytest.raises(ReachError, match="damaged") as caught:
        state.load("vps1")
    assert "quietport forget vps1" in caught.value.hint
    assert state.forget("vps1")
    assert state.load("vps1") == state.HostState()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["schema", "tailnet_addresses", "tailnet_port", "host_keys"]),
                inner,
                max_size=4,
            )
        ),
    )
)
def test_no_content_ends_in_a_traceback(operator: Operator, document: object) -> None:
    if not operator.hosts_file.exists():
        operator.host()
    if isinstance(document, dict):
        document.setdefault("schema", 1)
    (state.directory() / "vps1.json").write_text(json.dumps(document))
    try:
        known = state.load("vps1")
    except QuietportError:
        return
    assert isinstance(known, state.HostState)


def test_two_processes_lose_no_change(operator: Operator) -> None:
    operator.host()
    code = (
        "import sys; from dataclasses import replace; from control import state\n"
        "for n in range(20):\n"
        "    state.update('vps1', lambda s: replace(s, host_keys=(*s.host_keys, f'k {sys.argv[1]}-{n}')))\n"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(number)], env=os.environ) for number in range(2)
    ]
    assert [process.wait(60) for process in running] == [0, 0]
    assert len(state.load("vps1").host_keys) == 40


def test_an_unchanged_state_is_not_written(operator: Operator) -> None:
    operator.host()
    remember_tailnet("vps1", ["100.64.0.3"])
    path = state.directory() / "vps1.json"
    before = path.stat().st_ino
    remember_tailnet("vps1", ["100.64.0.3"])
    state.update("vps1", lambda old: old)
    assert path.stat().st_ino == before
    state.update("vps1", lambda old: replace(old, tailnet_port=2222))
    assert path.stat().st_ino != before


def test_no_address_changes_nothing(operator: Operator) -> None:
    operator.host()
    remember_tailnet("vps1", ["100.64.0.3"])
    remember_tailnet("vps1", [])
    assert state.load("vps1").tailnet_addresses == ("100.64.0.3",)
