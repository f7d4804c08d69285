"""hosts.example.toml: every key a hosts file may have, generated from the model that reads it."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from control.settings import HostSettings

WIDTH = 100
# What a key without a default, or with an empty one, could look like.
_SAMPLES: dict[str, Any] = {
    "address": "203.0.113.7",
    "identity_file": "~/.ssh/id_ed25519",
    "host_key": "SHA256:" + "A" * 43,
    "sudo_password": "command:pass show vps1/sudo",
    "login_password": "env:VPS1_FIRST_PASSWORD",
    "authorized_keys": ["ssh-ed25519 AAAA... me@laptop"],
    "hostname": "vps1",
    "tailnet_address": "100.64.0.3",
    "tailnet_proxy": "tailscale nc %h %p",
    "auth_key": "file:~/.config/quietport/auth_key",
    "tailscale_repository": "https://pkgs.tailscale.com/stable/debian",
    "tailscale_tags": ["tag:server"],
    "break_glass_cidrs": ["203.0.113.0/24", "2001:db8:7::/48"],
    "public_listeners": [
        {"port": 443, "protocol": "tcp", "unit": "caddy.service", "reason": "the web site"},
    ],
    "docker_repository": "https://download.docker.com/linux/debian",
    "docker_users": ["agent"],
    "agent_known_hosts": ["git.example.org ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI"],
    "notify_command": ["/usr/local/bin/tell-me", "ops"],
    "secrets": {"/etc/ai-ops-runner/secrets/openai_api_key": "env:OPENAI_API_KEY"},
}
_OWN = ("address", "hostname", "tailnet_address", "host_key")
_HEADER = """\
Copy this file to hosts.toml and fill in your host. hosts.toml is not committed.
It is generated: `quietport example` prints it.
[defaults] holds for every host, [hosts.NAME] for one; a host's own value wins.
A line that is commented out shows the default, or, after "for example", what a value looks like.
A source of a secret is env:NAME, file:PATH or command:ARGV, so sops, age, infisical and pass work.
Relative paths start at the directory of this file.
"""


def text() -> str:
    """The whole file. It is valid as it stands: one host, and every other key commented out."""
    fields = HostSettings.model_fields
    shared = [_entry(name, field) for name, field in fields.items() if name not in _OWN]
    own = [_entry(name, fields[name]) for name in _OWN if name != "address"]
    blocks = [
        _comment(_HEADER.splitlines(), wrap=False),
        "[defaults]",
        *shared,
        "[hosts.vps1]",
        _comment([fields["address"].description or ""]) + f"\naddress = {_toml(_SAMPLES['address'])}",
        *own,
    ]
    return "\n\n".join(blocks) + "\n"


def _entry(name: str, field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    words = field.description or ""
    if default in (None, PydanticUndefined) or (default in ((), {}) and name in _SAMPLES):
        return _comment([f"{words} For example:"]) + f"\n# {name} = {_toml(_SAMPLES[name])}"
    return _comment([words]) + f"\n# {name} = {_toml(default)}"


def _comment(lines: list[str], *, wrap: bool = True) -> str:
    wrapped = [part for line in lines for part in (textwrap.wrap(line, WIDTH) if wrap else [line])]
    return "\n".join(f"# {line}" for line in wrapped)


def _toml(value: Any) -> str:
    """A value as TOML. JSON's strings, numbers, booleans and lists are written the same there."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(key)} = {_toml(part)}" for key, part in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


def _key(name: str) -> str:
    return name if name.isidentifier() else json.dumps(name)
