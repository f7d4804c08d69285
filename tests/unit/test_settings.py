"""hosts.toml: what is accepted, what is refused and in which words, and that nothing ends in a traceback."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from control.errors import QuietportError, SettingsError
from control.labs import running_lab_files
from control.settings import HostSettings, hosts_file, load_fleet, nearest, parse_fleet
from deploys import programs
from quietport.ports import Declared, parse_declared

FILE = Path("/etc/quietport-test/hosts.toml")


def host(**values: str) -> HostSettings:
    """One host; the values are TOML."""
    lines = {"address": '"192.0.2.1"', **values}
    text = "[hosts.a]\n" + "".join(f"{key} = {value}\n" for key, value in lines.items())
    return parse_fleet(text, file=FILE).hosts["a"]


def refused(text: str) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        parse_fleet(text, file=FILE)
    assert str(FILE) in caught.value.what
    return caught.value


def refused_value(**values: str) -> str:
    lines = {"address": '"192.0.2.1"', **values}
    error = refused("[hosts.a]\n" + "".join(f"{key} = {value}\n" for key, value in lines.items()))
    assert "[hosts.a]" in error.what or "control character" in error.what
    return error.what


def test_defaults_hold_for_every_host_and_its_own_value_wins() -> None:
    fleet = parse_fleet(
        '[defaults]\nuser = "admin"\nport = 2222\n[hosts.a]\naddress = "192.0.2.1"\n'
        '[hosts.b]\naddress = "192.0.2.2"\nuser = "root"\n',
        file=FILE,
    )
    assert [(h.user, h.port) for h in fleet.hosts.values()] == [("admin", 2222), ("root", 2222)]


def test_secrets_of_both_places_add_up() -> None:
    fleet = parse_fleet(
        '[defaults.secrets]\n"/etc/x/a" = "env:A"\n"/etc/x/b" = "env:B"\n'
        '[hosts.a]\naddress = "192.0.2.1"\n[hosts.a.secrets]\n"/etc/x/b" = "env:OTHER"\n',
        file=FILE,
    )
    assert fleet.hosts["a"].secrets == {"/etc/x/a": "env:A", "/etc/x/b": "env:OTHER"}


def test_what_was_validated_cannot_change() -> None:
    with pytest.raises(Exception, match="frozen"):
        host().port = 23  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[hosts.a]\naddres = 'x'\n", "unknown key 'addres'. Did you mean address?"),
        ("[default]\n", "unknown table 'default'"),
        ("[hosts]\n", "no host in it"),
        ("", "no host in it"),
        ("hosts = 3\n", "[hosts] is not a table"),
        ("[hosts]\na = 3\n", "[hosts.a] is not a table"),
        ("defaults = []\n", "[defaults] is not a table"),
        ("[hosts.A]\naddress = 'x'\n", "a host's name is lower-case"),
        ("[hosts.a]\n", "address is missing. Correct it there"),
        ("[defaults]\naddress = 'x'\n[hosts.a]\n", "[defaults] has address"),
        ("[defaults]\nhostname = 'x'\n[hosts.a]\naddress = 'y'\n", "[defaults] has hostname"),
        ("a = " + "9" * 5000, "not TOML"),
        ("a = " + "[" * 20000, "not TOML"),
        ("a = 2021-13-45", "not TOML"),
        ('[hosts.a]\naddress = "x"\n[hosts.b]\naddress = "X."\n', "have one address, x"),
        ('[hosts.a]\naddress = "::1"\n[hosts.b]\naddress = "0:0:0::1"\n', "have one address, ::1"),
        (
            '[hosts.a]\naddress = "x"\nhostname = "b"\n[hosts.b]\naddress = "y"\n',
            "have one name on the tailnet, b",
        ),
    ],
)
def test_a_wrong_file(text: str, words: str) -> None:
    assert words in str(refused(text))


def test_two_hosts_behind_one_address_may_differ_by_port() -> None:
    text = '[hosts.a]\naddress = "x"\nport = 1\n[hosts.b]\naddress = "x"\nport = 2\n'
    assert set(parse_fleet(text, file=FILE).hosts) == {"a", "b"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("address", '"-oProxyCommand=x"'),
        ("address", '"a b"'),
        ("address", '"a\\n"'),
        ("address", '"$(x)"'),
        ("address", '""'),
        ("address", "7"),
        ("port", "0"),
        ("port", "65536"),
        ("port", '"22"'),
        ("port", "true"),
        ("port", "22.0"),
        ("user", '"Root"'),
        ("user", '"-x"'),
        ("user", '"root\\n"'),
        ("host_key", '"MD5:aa"'),
        ("host_key", '"SHA256:AAAA"'),
        ("sudo_password", '"hunter2"'),
        ("auth_key", '"tskey-auth-secret"'),
        ("auth_key", '"env:"'),
        ("auth_key", '"command:\'"'),
        ("auth_key", "\"command:''\""),
        ("auth_key", '"file:\\u0000"'),
        ("hostname", '"Vps_1"'),
        ("tailnet_address", '"vps1"'),
        ("tailnet_address", '"100.64.0.300"'),
        ("tailnet_proxy", '"nc host 22"'),
        ("tailnet_proxy", '"nc \'%h"'),
        ("login_server", '"ftp://x"'),
        ("login_server", '"https://x\\n"'),
        ("login_server", '"https://x y"'),
        ("tailscale_key_fingerprint", '"ABC"'),
        ("tailscale_tags", '["server"]'),
        ("accept_dns", '"yes"'),
        ("accept_dns", "1"),
        ("docker_source", '"podman"'),
        ("docker_users", '["stranger"]'),
        ("agent_users", '["root"]'),
        ("agent_users", '["a", "a"]'),
        ("agent_users", '"agent"'),
        ("authorized_keys", '["not a key"]'),
        ("authorized_keys", '["ssh-ed25519 AAAA\\nssh-rsa BBBB"]'),
        ("secrets", '{ "/root/x/y" = "env:X" }'),
        ("secrets", '{ "/etc/x" = "env:X" }'),
        ("secrets", '{ "/etc/x/../y/z" = "env:X" }'),
        ("secrets", '{ "/etc/x/" = "env:X" }'),
        ("secrets", '{ "/etc/ssh/key" = "env:X" }'),
        ("secrets", '{ "/etc/x/y\\n" = "env:X" }'),
        ("secrets", '{ "/etc/x/y" = "value" }'),
        ("secrets", '["/etc/x/y"]'),
        ("prune_foreign", '"false"'),
        ("notify_command", '"tell-me ops"'),
        ("notify_command", '["", "ops"]'),
        ("notify_command", '["tell-me", "o\\nps"]'),
        ("public_listeners", '["443/tcp"]'),
        ("public_listeners", '{ port = 443, reason = "x" }'),
        ("public_listeners", "[{ port = 443 }]"),
        ("public_listeners", '[{ port = 443, reason = " " }]'),
        ("public_listeners", '[{ reason = "x" }]'),
        ("public_listeners", '[{ port = "443", reason = "x" }]'),
        ("public_listeners", '[{ port = 65536, reason = "x" }]'),
        ("public_listeners", '[{ port = 443, protocol = "sctp", reason = "x" }]'),
        ("public_listeners", '[{ port = 443, unit = "caddy", reason = "x" }]'),
        ("public_listeners", '[{ port = 443, unit = "a b.service", reason = "x" }]'),
        ("public_listeners", '[{ port = 443, process = "caddy", reason = "x" }]'),
        ("public_listeners", '[{ port = 22, unit = "caddy.service", reason = "x" }]'),
        ("public_listeners", '[{ port = 2222, unit = "ssh.service", reason = "x" }]'),
        ("public_listeners", '[{ port = 2222, unit = "sshd@7.service", reason = "x" }]'),
        ("public_listeners", '[{ port = 1, reason = "x" }, { port = 1, reason = "y" }]'),
    ],
)
def test_a_wrong_value_is_refused_and_named(key: str, value: str) -> None:
    assert key in refused_value(**{key: value})


@pytest.mark.parametrize("key", ["auth_key", "sudo_password", "login_password"])
def test_a_secret_in_the_wrong_place_is_not_repeated(key: str) -> None:
    for value in ("canary-value", "canary-value: x", "commando:canary-value"):
        assert "canary" not in refused_value(**{key: f'"{value}"'})
    assert "canary" not in refused_value(secrets='{ "/etc/x/y" = "canary-value" }')
    assert host(**{key: '"env:CANARY"'}), "the positive control"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("address", '"2001:db8::1"'),
        ("address", '"::1"'),
        ("address", '"vps1.example.com"'),
        ("user", '"_svc-1"'),
        ("host_key", '"SHA256:' + "A" * 43 + '"'),
        ("tailscale_key_fingerprint", '"2596 A99E AAB3 3821 893C 0A79 458C A832 957F 5868"'),
        ("tailnet_proxy", '"tailscale nc %h %p"'),
        ("authorized_keys", '["sk-ssh-ed25519@openssh.com AAAA me@laptop"]'),
        ("secrets", '{ "/etc/ai-ops-runner/secrets/openai_api_key" = "command:pass show x" }'),
        ("secrets", '{ "/etc/ssh/own/key" = "env:X" }'),
        ("docker_users", '["agent", "root"]'),
        ("notify_command", '["/usr/local/bin/tell-me", "ops"]'),
        ("public_listeners", '[{ port = 443, unit = "caddy.service", reason = "the web site" }]'),
        ("public_listeners", '[{ port = 51820, protocol = "udp", reason = "a tunnel home" }]'),
        ("public_listeners", '[{ port = 1, reason = "x" }, { port = 1, protocol = "udp", reason = "y" }]'),
        ("public_listeners", '[{ port = 22, protocol = "udp", unit = "a@b.service", reason = "x" }]'),
    ],
)
def test_good_values(key: str, value: str) -> None:
    assert host(**{key: value})


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{ port = 443 }", "public_listeners, entry 1, 'reason' is missing. Correct it there"),
        ('{ port = 443, reason = "x", who = "me" }', "public_listeners, entry 1, 'who' is not known there."),
        ('{ port = 22, reason = "x" }', "cannot be sshd; break_glass_cidrs is the way"),
        ("3", "public_listeners, entry 1 must be a table"),
    ],
)
def test_an_exception_that_cannot_be_used_is_one_sentence(entry: str, words: str) -> None:
    error = refused(f'[hosts.a]\naddress = "x"\npublic_listeners = [{entry}]\n')
    assert words in str(error)


def test_exceptions_are_told_to_the_host() -> None:
    settings = host(public_listeners='[{ port = 443, unit = "caddy.service", reason = " the web site " }]')
    assert programs.declared("a", settings)["public_listeners"] == [
        {"port": 443, "protocol": "tcp", "unit": "caddy.service", "reason": "the web site"}
    ]
    assert parse_declared(programs.declared("a", settings)["public_listeners"]) == (
        Declared("tcp", 443, "the web site", "caddy.service"),
    )
    assert programs.declared("a", host())["public_listeners"] == []


def test_addresses_are_written_one_way() -> None:
    assert host(tailnet_address='"FD7A:0::3"').tailnet_address == "fd7a::3"
    assert host(tailscale_key_fingerprint='"' + "ab " * 20 + '"').tailscale_key_fingerprint == "AB" * 20


def test_docker_users_without_docker() -> None:
    assert "docker_users needs docker_source" in refused_value(
        docker_source='"none"', docker_users='["agent"]'
    )


def test_relative_paths_start_at_the_file() -> None:
    found = host(identity_file='"keys/id"', auth_key='"file:key"', secrets='{ "/etc/x/y" = "file:s/y" }')
    assert found.identity_file == "/etc/quietport-test/keys/id"
    assert found.auth_key == "file:/etc/quietport-test/key"
    assert found.secrets == {"/etc/x/y": "file:/etc/quietport-test/s/y"}
    kept = host(identity_file='"~/id"', auth_key='"file:/k"', sudo_password='"command:cat key"')
    assert (kept.identity_file, kept.auth_key, kept.sudo_password) == ("~/id", "file:/k", "command:cat key")


def test_nearest() -> None:
    assert nearest("hostnam", ["hostname", "user"]) == " Did you mean hostname?"
    assert nearest("zzz", ["hostname"]) == ""


# --- nothing ends in a traceback ---

VALUES = st.recursive(
    st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
    | st.sampled_from(["root", "env:A", "file:~x/y", "command:'", "::1", "192.0.2.1", "SHA256:", "/etc/a/b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=6,
)


def toml(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{quoted(key)} = {toml(part)}" for key, part in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return quoted(value) if isinstance(value, str) else repr(value)


def quoted(text: str) -> str:
    plain = "".join(c if c.isalnum() or c in " :/._-'" else f"\\U{ord(c):08x}" for c in text)
    return f'"{plain}"'


def parses_or_refuses(text: str) -> None:
    try:
        parse_fleet(text, file=FILE)
    except QuietportError as error:
        assert "\n" not in str(error)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(HostSettings.model_fields)), VALUES, max_size=5))
def test_any_values_of_known_keys(values: dict[str, Any]) -> None:
    values = {"address": "192.0.2.1", **values}
    parses_or_refuses("[hosts.a]\n" + "".join(f"{key} = {toml(value)}\n" for key, value in values.items()))


@settings(max_examples=200, deadline=None)
@given(VALUES, VALUES)
def test_any_tables(defaults: Any, hosts: Any) -> None:
    parses_or_refuses(f"defaults = {toml(defaults)}\nhosts = {toml(hosts)}\n")


@settings(max_examples=300, deadline=None)
@example("\ufeff")
@given(st.text(max_size=200))
def test_any_text(text: str) -> None:
    parses_or_refuses(text)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(data)
    with pytest.raises(SettingsError):
        load_fleet(path)


# --- which file ---


def test_the_named_file_comes_first(tmp_path: Path) -> None:
    named = tmp_path / "named.toml"
    named.write_text("")
    (tmp_path / "hosts.toml").write_text("")
    assert hosts_file({"QUIETPORT_HOSTS": str(named)}, tmp_path) == named
    assert hosts_file({"QUIETPORT_HOSTS": ""}, tmp_path) == tmp_path / "hosts.toml"
    named.unlink()
    with pytest.raises(SettingsError, match="QUIETPORT_HOSTS names"):
        hosts_file({"QUIETPORT_HOSTS": str(named)}, tmp_path)


def lab(root: Path, name: str, age: int = 0) -> Path:
    file = root / name / "hosts.toml"
    file.parent.mkdir(parents=True)
    file.write_text("")
    os.utime(file, (1000 - age, 1000 - age))
    return file


def test_the_only_running_lab_is_the_last_resort(tmp_path: Path) -> None:
    environ = {"QUIETPORT_LAB_ROOT": str(tmp_path / "labs")}
    with pytest.raises(SettingsError, match="no lab runs"):
        hosts_file(environ, tmp_path)
    first = lab(tmp_path / "labs", "one")
    assert hosts_file(environ, tmp_path) == first
    (tmp_path / "hosts.toml").write_text("")
    assert hosts_file(environ, tmp_path) == tmp_path / "hosts.toml"


def test_of_two_labs_none_is_guessed(tmp_path: Path) -> None:
    environ = {"QUIETPORT_LAB_ROOT": str(tmp_path / "labs")}
    new, old = lab(tmp_path / "labs", "new"), lab(tmp_path / "labs", "old", age=500)
    assert running_lab_files(environ) == [old, new]
    with pytest.raises(SettingsError, match="2 labs run") as caught:
        hosts_file(environ, tmp_path)
    assert str(new) in caught.value.hint
    assert str(old) in caught.value.hint


@pytest.mark.parametrize("data", [b"\xff\xfe", None])
def test_a_file_that_cannot_be_read(tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "hosts.toml"
    if data is None:
        path.mkdir()
    else:
        path.write_bytes(data)
    with pytest.raises(SettingsError, match=str(path)):
        load_fleet(path)


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    path = tmp_path / "hosts.toml"
    path.write_bytes(b'\xef\xbb\xbf[hosts.a]\naddress = "192.0.2.1"\n')
    assert set(load_fleet(path).hosts) == {"a"}
