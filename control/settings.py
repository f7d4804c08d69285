"""Everything a host can be told: one typed model, read from hosts.toml before any connection.

`[defaults]` holds for every host, `[hosts.NAME]` for one. Every key is a field of `HostSettings`;
its description is what `hosts.example.toml` says about it.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import shlex
import stat
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from control.errors import SettingsError
from control.secret import check_source

ENV_HOSTS = "QUIETPORT_HOSTS"
DEFAULT_FILE = "hosts.toml"
# Names of groups that hold every host: the variable in `inventory`, and the name of that file.
GROUPS = ("hosts", "inventory")
READABLE = f"Make it a file you may read, or set {ENV_HOSTS} to another."
UPSTREAM_LOGIN_SERVER = "https://controlplane.tailscale.com"
# The primary keys upstream publishes: https://tailscale.com/kb/1031 and
# https://docs.docker.com/engine/install/debian.
TAILSCALE_KEY_FINGERPRINT = "2596A99EAAB33821893C0A79458CA832957F5868"
DOCKER_KEY_FINGERPRINT = "9DC858229FC7DD38854AE2D88D81803C0EBFCD88"

_HOST_NAME = re.compile(r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
_USER_NAME = re.compile(r"^[a-z_][a-z0-9_-]{0,30}$")
_FINGERPRINT = re.compile(r"^[0-9A-F]{40}$")
_SSH_FINGERPRINT = re.compile(r"^SHA256:[A-Za-z0-9+/]{43}$")
_UNIT_NAME = re.compile(r"^[A-Za-z0-9:_.@\\-]{1,240}\.(service|socket)$")
_SSH_UNIT = re.compile(r"^sshd?(@.*)?\.(service|socket)$")
_TAG = re.compile(r"^tag:[a-z][a-z0-9-]*$")
# A DNS name, or an alias of ~/.ssh/config. Nothing in it starts an option or a shell construct.
_DNS_NAME = re.compile(
    r"(?=.{1,253}$)([A-Za-z0-9]([A-Za-z0-9_-]{0,62})\.)*[A-Za-z0-9]([A-Za-z0-9_-]{0,62})\.?$"
)
_WITH_PORT = re.compile(r"^(\[.*\]|[^:]*):\d*$")
# Directories of the system below /etc: made 0700 for a secret, they would break what reads them.
_NOT_OURS = frozenset(
    f"/etc/{name}"
    for name in (
        *("apt", "cron.d", "cron.daily", "default", "docker", "init.d", "logrotate.d", "pam.d", "profile.d"),
        *("quietport", "security", "skel", "ssh", "ssl", "ssl/certs", "ssl/private", "sudoers.d", "sysctl.d"),
        *("systemd", "systemd/system", "ufw"),
    )
)

Source = str

CORRECT = "Correct it there; `quietport example` explains every key."
# pydantic's kinds of error in the words of a TOML file: https://docs.pydantic.dev/latest/errors/validation_errors/
_WORDS = {
    "missing": "is missing",
    "string_type": "must be text in quotes",
    "int_type": "must be a whole number without quotes",
    "bool_type": "must be true or false, without quotes",
    "tuple_type": "must be a list in square brackets",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "extra_forbidden": "is not known there",
    "literal_error": "must be {expected}",
    "greater_than_equal": "must be {ge} or more",
    "less_than_equal": "must be {le} or less",
}


class PublicListener(BaseModel):
    """A listener that may be public: the exception, and its reason."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    port: int = Field(ge=1, le=65535, strict=True)
    protocol: Literal["tcp", "udp"] = "tcp"
    # Whose processes: a name that is merely called like a service excuses nobody (quietport/ports.py).
    unit: str | None = None
    reason: str

    @field_validator("unit")
    @classmethod
    def _unit(cls, value: str | None) -> str | None:
        if value is not None:
            _check(_UNIT_NAME, value, "must be a systemd unit such as caddy.service")
        return value

    @field_validator("reason")
    @classmethod
    def _reason(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must say why: it is shown wherever the exception is used")
        return value.strip()

    @model_validator(mode="after")
    def _not_sshd(self) -> PublicListener:
        if _SSH_UNIT.match(self.unit or "") or (self.protocol, self.port) == ("tcp", 22):
            raise ValueError("cannot be sshd; break_glass_cidrs is the way to reach it in public")
        return self


class HostSettings(BaseModel):
    """What one host is told. Frozen: what was validated is what is used."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    address: str = Field(description="Public address or DNS name the blank host is reached by.")
    port: int = Field(
        22,
        ge=1,
        le=65535,
        strict=True,
        description="Port sshd answers on at the public address while the host is blank.",
    )
    user: str = Field(
        "root",
        description="User to log in as. Without it: what ~/.ssh/config says for the address, else root. "
        "Anyone but root needs sudo.",
    )
    identity_file: str | None = Field(
        None,
        description="Private key to log in with. Without it: what ~/.ssh/config says, the SSH agent, "
        "the default keys.",
    )
    host_key: str | None = Field(
        None,
        description="Fingerprint (SHA256:...) of the host key, when the provider tells it. "
        "Without it the first key seen is pinned.",
    )
    sudo_password: Source | None = Field(
        None, description="Source of the password sudo asks for (env:NAME, file:PATH, command:ARGV)."
    )
    login_password: Source | None = Field(
        None,
        description="Source of the password of the first login, where the provider gives no key. "
        "Passwords are off afterwards.",
    )
    authorized_keys: tuple[str, ...] = Field(
        (),
        description="Public keys added for the login user and for the agent users; keys already there stay.",
    )

    hostname: str | None = Field(
        None, description="The host's name on the tailnet. Without it: its name here."
    )
    tailnet_address: str | None = Field(
        None,
        description="Tailnet address of a host that was joined elsewhere. "
        "Without it: remembered, or asked of the operator's tailscale.",
    )
    tailnet_proxy: str | None = Field(
        None,
        description="Command that carries SSH into the tailnet (%h and %p are filled in), "
        "for a tailscaled in userspace mode.",
    )
    auth_key: Source | None = Field(
        None, description="Source of the key the host joins the tailnet with. Not needed once it is joined."
    )
    login_server: str = Field(UPSTREAM_LOGIN_SERVER, description="Control server of the tailnet.")
    tailscale_repository: str | None = Field(
        None, description="apt repository of tailscale. Without it: upstream's for the host's distribution."
    )
    tailscale_key_fingerprint: str = Field(
        TAILSCALE_KEY_FINGERPRINT, description="Fingerprint of the key that signs that repository."
    )
    tailscale_tags: tuple[str, ...] = Field(
        (), description="Tags the node asks for when it joins; an OAuth secret as auth_key needs them."
    )
    accept_dns: bool = Field(True, strict=True, description="Use the tailnet's DNS settings.")
    accept_routes: bool = Field(False, strict=True, description="Use routes other nodes advertise.")
    accept_key_expiry: bool = Field(
        False,
        strict=True,
        description="Go on although the node's key will expire. It then drops off the tailnet on that day.",
    )

    break_glass_cidrs: tuple[str, ...] = Field(
        (),
        description="Networks that reach sshd at the public address too, also while the tailnet is down. "
        "sshd then listens on every address, and the firewall alone keeps the others out.",
    )

    public_listeners: tuple[PublicListener, ...] = Field(
        (),
        description="What may listen in public besides tailscaled and a DHCP client: port, protocol (tcp, "
        "udp), unit whose processes may, and the reason, which is shown. Without a unit: a socket of the "
        "kernel, such as WireGuard's. The firewall is not opened by it.",
    )

    docker_source: Literal["debian", "docker", "none"] = Field(
        "debian",
        description="Engine and compose of the distribution, of Docker's own repository, or none at all.",
    )
    docker_repository: str | None = Field(
        None, description="apt repository of Docker. Without it: upstream's for the host's distribution."
    )
    docker_key_fingerprint: str = Field(
        DOCKER_KEY_FINGERPRINT, description="Fingerprint of the key that signs that repository."
    )
    docker_users: tuple[str, ...] = Field(
        (),
        description="Users put into the docker group. Each of them is root in all but name: "
        "whoever can start containers can read and write every file.",
    )

    agent_users: tuple[str, ...] = Field(
        ("agent",), description="Users the agents run as. Made without a password and without sudo."
    )
    agent_known_hosts: tuple[str, ...] = Field(
        (),
        description="Lines of known_hosts that name the hosts an agent's session may be bound to with "
        "--allow-host.",
    )
    secrets: dict[str, Source] = Field(
        default_factory=dict,
        description="Files with a secret: path on the host = source. "
        "Owned by root, mode 0600, directory 0700.",
    )
    # Hosts of one run go step by step together: one whose link is cut is waited for, a minute a step.
    guard_timeout: int = Field(
        300,
        ge=10,
        le=3600,
        strict=True,
        description="Seconds after which the host undoes a change of firewall or ssh by itself, unless a new "
        "login has proven it.",
    )
    prune_foreign: bool = Field(
        False,
        strict=True,
        description="Remove firewall rules that are not ours. Otherwise they are reported and left.",
    )
    unattended_upgrades: bool = Field(
        True, strict=True, description="Install security updates, and tailscale's, without being asked."
    )
    notify_command: tuple[str, ...] = Field(
        (),
        description="Program of the host, and its arguments, that is run there as root when the host's "
        "doctor comes to another result, with the report on standard input. No shell, and no place for a "
        "secret: let it read its own from a file.",
    )

    @property
    def agents(self) -> tuple[str, ...]:
        return self.agent_users

    @field_validator("address")
    @classmethod
    def _address(cls, value: str) -> str:
        if not _is_ip(value) and (problem := _address_problem(value)):
            raise ValueError(problem)
        return value

    @field_validator("tailnet_address")
    @classmethod
    def _tailnet_address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not _is_ip(value):
            raise ValueError(_address_problem(value) or "must be an IP address, not a name")
        return _canonical(value)

    @field_validator("user")
    @classmethod
    def _user(cls, value: str) -> str:
        return _check(_USER_NAME, value, "must be a user name such as root or admin")

    @field_validator("agent_users", "docker_users")
    @classmethod
    def _users(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            _check(_USER_NAME, value, "must be a list of user names such as agent")
        if len(set(values)) != len(values):
            raise ValueError("names a user twice")
        return values

    @field_validator("agent_users")
    @classmethod
    def _agents(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if "root" in values:
            raise ValueError("must not name root: agents run as a user of their own")
        return values

    @field_validator("hostname")
    @classmethod
    def _hostname(cls, value: str | None) -> str | None:
        return (
            value
            if value is None
            else _check(_HOST_NAME, value, "must be lower-case letters, digits and dashes, 63 at most")
        )

    @field_validator("tailscale_key_fingerprint", "docker_key_fingerprint", mode="before")
    @classmethod
    def _fingerprint(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return _check(
            _FINGERPRINT, value.replace(" ", "").upper(), "must be the 40 hex digits of a primary key"
        )

    @field_validator("host_key")
    @classmethod
    def _host_key(cls, value: str | None) -> str | None:
        return (
            value
            if value is None
            else _check(
                _SSH_FINGERPRINT, value, "must be SHA256: and 43 characters, as ssh-keygen -lf prints it"
            )
        )

    @field_validator("login_server", "tailscale_repository", "docker_repository")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"https?://[^\s\"'\\]+", value):
            raise ValueError("must be an address that begins with https:// or http://")
        return value

    @field_validator("tailscale_tags")
    @classmethod
    def _tags(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            _check(_TAG, value, "must be a list of tags such as tag:server")
        return values

    @field_validator("authorized_keys")
    @classmethod
    def _keys(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if "\n" in value or not re.match(r"^(ssh-|ecdsa-|sk-)\S+ \S+", value):
                raise ValueError("must be a list of public keys as in authorized_keys, without options")
        return values

    @field_validator("agent_known_hosts")
    @classmethod
    def _known_hosts(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if not re.fullmatch(r"[^\s#@|]\S* (ssh-|ecdsa-|sk-)\S+ [A-Za-z0-9+/]+=*", value):
                raise ValueError("must be a list of lines such as 'git.example.org ssh-ed25519 AAAA...'")
        return values

    @field_validator("sudo_password", "login_password", "auth_key")
    @classmethod
    def _source(cls, value: str | None) -> str | None:
        return value if value is None else check_source(value)

    @field_validator("secrets")
    @classmethod
    def _secrets(cls, values: dict[str, str]) -> dict[str, str]:
        for path, source in values.items():
            if not path.startswith("/"):
                # Path and source may have been swapped, and the source be the secret itself: not repeated.
                raise ValueError('must be "PATH" = "SOURCE", and one PATH does not begin with /')
            if (
                not re.fullmatch(r"/etc/[A-Za-z0-9._/-]+", path)
                or ".." in path.split("/")
                or path.endswith("/")
            ):
                raise ValueError(f"has a path that is not a plain file below /etc: {path!r}")
            if len(Path(path).parts) < 4:
                raise ValueError(
                    f"has a file directly in /etc: {path!r}; "
                    "give it a directory of its own, which becomes 0700"
                )
            if str(Path(path).parent) in _NOT_OURS:
                raise ValueError(
                    f"has a file directly in {Path(path).parent}, which others need to read; "
                    "give it a directory of its own, which becomes 0700"
                )
            try:
                check_source(source)
            except ValueError as error:
                raise ValueError(f"has for {path!r} a source that {error}") from None
        return values

    @field_validator("notify_command")
    @classmethod
    def _notify_command(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if values and not values[0].strip():
            raise ValueError('must begin with a program, such as ["/usr/local/bin/tell-me", "ops"]')
        if any(not value.isprintable() for value in values):
            raise ValueError("has a character that cannot be printed")
        return values

    @field_validator("break_glass_cidrs")
    @classmethod
    def _networks(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        networks = [_network(value) for value in values]
        if len(set(networks)) != len(networks):
            raise ValueError("names a network twice")
        four = [network for network in networks if isinstance(network, ipaddress.IPv4Network)]
        six = [network for network in networks if isinstance(network, ipaddress.IPv6Network)]
        for whole in (*ipaddress.collapse_addresses(four), *ipaddress.collapse_addresses(six)):
            if str(whole).endswith("/0"):
                raise ValueError(
                    f"lets everybody in ({whole}); name the networks you come from, such as 203.0.113.0/24"
                )
        return tuple(map(str, networks))

    @field_validator("public_listeners")
    @classmethod
    def _listeners(cls, values: tuple[PublicListener, ...]) -> tuple[PublicListener, ...]:
        places = [(value.protocol, value.port, value.unit) for value in values]
        if len(set(places)) != len(places):
            raise ValueError("names one port and unit twice")
        return values

    @field_validator("tailnet_proxy")
    @classmethod
    def _proxy(cls, value: str | None) -> str | None:
        if value is not None:
            if "%h" not in value:
                raise ValueError("must have %h where the host's address goes")
            try:
                shlex.split(value)
            except ValueError:
                raise ValueError("must be a command; a quote in it is not closed") from None
        return value

    @model_validator(mode="after")
    def _belongs_together(self) -> HostSettings:
        if self.docker_source == "none" and self.docker_users:
            raise ValueError('docker_users needs docker_source = "debian" or "docker"')
        unknown = set(self.docker_users) - set(self.agent_users) - {self.user}
        if unknown:
            raise ValueError(
                f"docker_users names {', '.join(sorted(unknown))}, "
                "which is neither in agent_users nor the login user"
            )
        return self

    def to_json(self) -> dict[str, Any]:
        """What may be printed: sources, never secrets."""
        return self.model_dump(mode="json")


@dataclass(frozen=True)
class Fleet:
    """All hosts of one file."""

    file: Path
    hosts: dict[str, HostSettings]


def _is_ip(text: str) -> bool:
    try:
        # A zone (fe80::1%eth0) means something on one machine only, and % is expanded in proxy commands.
        return "%" not in text and bool(ipaddress.ip_address(text))
    except ValueError:
        return False


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """The network a text names; one address is a network of its own. Raises ValueError."""
    try:
        # A zone means something on one machine only.
        interface = None if "%" in text else ipaddress.ip_interface(text)
    except ValueError:
        interface = None
    if interface is None:
        raise ValueError(f"must be a list of networks such as 203.0.113.0/24 or 2001:db8::/48, not {text!r}")
    network = interface.network
    if isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped is not None:
        raise ValueError(f"has {text}, an IPv4 network in an IPv6 one; write it as the IPv4 network it is")
    if interface.ip != network.network_address:
        raise ValueError(f"has {text}, an address inside of a network; the network is {network}")
    return network


def _address_problem(text: str) -> str | None:
    """Why a text that is no IP address cannot be a host's address either; None for a name."""
    if "://" in text:
        return "must be an IP address or a DNS name alone, without a scheme such as ssh://"
    if "@" in text:
        return "must be an IP address or a DNS name alone; whom to log in as goes into user"
    if "/" in text:
        return "must be the address of one host, not a network or a path"
    if _WITH_PORT.fullmatch(text):
        return "must be an IP address or a DNS name alone; the port goes into port"
    # What ends in a number is no name: the resolver takes 127.1 and 010.0.0.1 for addresses of its own.
    if not _DNS_NAME.fullmatch(text) or text.rstrip(".").rpartition(".")[2].isdigit():
        return "must be an IP address or a DNS name"
    return None


def _check(pattern: re.Pattern[str], value: str, rule: str) -> str:
    if not pattern.fullmatch(value):
        raise ValueError(rule)
    return value


def nearest(word: str, known: list[str]) -> str:
    """The sentence that points at the known word most like `word`, or nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def parse_fleet(text: str, *, file: Path) -> Fleet:
    """Read the text of a hosts file.

    Raises SettingsError with the host and the key for the first thing that cannot be used.
    """
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, a thousand brackets
        what = str(error).replace("Cannot overwrite a value", "a key is there twice")
        raise SettingsError(f"{file}: not TOML: {what}.", hint="Correct that line.") from error
    _refuse_control_characters(document, file, ())
    for key in document:
        if key not in ("defaults", "hosts"):
            raise SettingsError(
                f"{file}: unknown table {key!r}.{nearest(key, ['defaults', 'hosts'])}",
                hint="There are [defaults] and [hosts.NAME].",
            )
    defaults = _table(document.get("defaults", {}), file, "[defaults]")
    for key in ("address", "tailnet_address", "hostname", "host_key"):
        if key in defaults:
            raise SettingsError(
                f"{file}: [defaults] has {key}; every host has its own.", hint="Move it to [hosts.NAME]."
            )
    tables = _table(document.get("hosts", {}), file, "[hosts]")
    if not tables:
        raise SettingsError(f"{file}: no host in it.", hint="Add [hosts.NAME] with an address.")
    hosts = {
        name: _host(name, _table(table, file, f"[hosts.{name}]"), defaults, file)
        for name, table in tables.items()
    }
    _refuse_shared_addresses(hosts, file)
    _refuse_shared_names(hosts, file)
    return Fleet(file=file, hosts=hosts)


def _table(value: Any, file: Path, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SettingsError(f"{file}: {where} is not a table.", hint="Its keys go below a line of their own.")
    return value


def _refuse_control_characters(value: Any, file: Path, where: tuple[str, ...]) -> None:
    """A line break in a value would become a line of its own in a file it is written to."""
    if isinstance(value, str) and any(ord(char) < 32 or ord(char) == 127 for char in value):
        place = f"[{'.'.join(where[:-1])}]: {where[-1]}" if where[1:] else where[0]
        raise SettingsError(
            f"{file}: {place} has a line break or another control character in it.", hint="Take it out."
        )
    if isinstance(value, dict):
        for key, part in value.items():
            _refuse_control_characters(key, file, (*where, "a key"))
            _refuse_control_characters(part, file, (*where, key))
    if isinstance(value, list):
        for part in value:
            _refuse_control_characters(part, file, where)


def _anchored(values: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The same keys, relative paths made to start at the hosts file: its hosts are the same from anywhere."""

    def path(text: str) -> str:
        return text if text.startswith(("/", "~")) else str(directory / text)

    def source(value: Any) -> Any:
        if isinstance(value, str) and value.startswith("file:") and value[5:].strip():
            return f"file:{path(value[5:])}"
        return value

    out = dict(values)
    if isinstance(out.get("identity_file"), str) and out["identity_file"]:
        out["identity_file"] = path(out["identity_file"])
    for key in ("sudo_password", "login_password", "auth_key"):
        if key in out:
            out[key] = source(out[key])
    if isinstance(out.get("secrets"), dict):
        out["secrets"] = {name: source(value) for name, value in out["secrets"].items()}
    return out


def _host(name: str, table: dict[str, Any], defaults: dict[str, Any], file: Path) -> HostSettings:
    if name in GROUPS:
        raise SettingsError(
            f"{file}: [hosts.{name}]: pyinfra's --limit {name} means every host.",
            hint="Give this one another name.",
        )
    if not _HOST_NAME.fullmatch(name):
        raise SettingsError(
            f"{file}: [hosts.{name}]: a host's name is lower-case letters, digits and dashes, 63 at most.",
            hint="Rename it.",
        )
    known = list(HostSettings.model_fields)
    for where, keys in (("[defaults]", defaults), (f"[hosts.{name}]", table)):
        for key in keys:
            if key not in known:
                raise SettingsError(
                    f"{file}: {where}: unknown key {key!r}.{nearest(key, known)}",
                    hint="`quietport example` explains every key.",
                )
    merged = {**defaults, **table}
    if isinstance(defaults.get("secrets"), dict) and isinstance(table.get("secrets"), dict):
        merged["secrets"] = {**defaults["secrets"], **table["secrets"]}
    try:
        return HostSettings(**_anchored(merged, file.absolute().parent))
    except ValidationError as error:
        # The input may be a secret pasted in the wrong place: pydantic's own text would repeat it.
        first = error.errors(include_input=False, include_url=False)[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        where = "[defaults]" if key in defaults and key not in table else f"[hosts.{name}]"
        raise SettingsError(f"{file}: {where}: {_problem(first)}.", hint=CORRECT) from None


def _problem(error: ErrorDetails) -> str:
    """What pydantic found, as the key and what it must be."""
    key, *inside = error["loc"] or ("",)
    words = _WORDS.get(error["type"], "").format(**error.get("ctx", {}))
    # A part is a place in a list, or a path in `secrets`.
    parts = "".join(f", entry {part + 1}" if isinstance(part, int) else f", {part!r}" for part in inside)
    return f"{key}{parts} {words or str(error['msg']).removeprefix('Value error, ')}".strip()


def _refuse_shared_addresses(hosts: dict[str, HostSettings], file: Path) -> None:
    """No two hosts are one machine. Behind one public address they may differ by port."""
    public: dict[tuple[str, int], str] = {}
    tailnet: dict[str, str] = {}
    for name, host in hosts.items():
        address = _canonical(host.address)
        _refuse_shared(public.setdefault((address, host.port), name), name, address, file)
        if host.tailnet_address:
            address = host.tailnet_address
            _refuse_shared(tailnet.setdefault(address, name), name, address, file)
    for (address, _), name in public.items():
        _refuse_shared(tailnet.get(address, name), name, address, file)


def _refuse_shared(one: str, other: str, address: str, file: Path) -> None:
    if one != other:
        raise SettingsError(
            f"{file}: hosts {one} and {other} have one address, {address}.",
            hint="Correct one of them; behind one public address they differ by port.",
        )


def _refuse_shared_names(hosts: dict[str, HostSettings], file: Path) -> None:
    seen: dict[str, str] = {}
    for name, host in hosts.items():
        called = host.hostname or name
        if called in seen:
            raise SettingsError(
                f"{file}: hosts {seen[called]} and {name} have one name on the tailnet, {called}.",
                hint="Give one of them another hostname.",
            )
        seen[called] = name


def _canonical(address: str) -> str:
    """One spelling of an address: an IPv4 address in an IPv6 one is the same host."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address.lower().rstrip(".")
    return str(getattr(found, "ipv4_mapped", None) or found)


def hosts_file(environ: dict[str, str] | None = None, cwd: Path | None = None) -> Path:
    """The file that names the hosts: QUIETPORT_HOSTS, else hosts.toml, else the only running lab's.

    Raises SettingsError when there is none, or more than one lab runs.
    """
    environ = dict(os.environ) if environ is None else environ
    cwd = cwd or Path.cwd()
    if named := environ.get(ENV_HOSTS):
        path = Path(named)
        if _kind(path) != "file":
            raise SettingsError(
                f"{ENV_HOSTS} names {path}, which is not a file.", hint=f"Correct or unset {ENV_HOSTS}."
            )
        return path
    if _kind(cwd / DEFAULT_FILE) == "file":
        return cwd / DEFAULT_FILE
    if _kind(cwd / DEFAULT_FILE) == "other":
        # Going on to the lab's file would be a surprise.
        raise SettingsError(
            f"{cwd / DEFAULT_FILE} is not a file.", hint=f"Move it away, or set {ENV_HOSTS} to the file."
        )
    from control.labs import running_lab_files  # late: only this branch looks for labs

    labs = running_lab_files(environ)
    if len(labs) == 1:
        return labs[0]
    if labs:
        raise SettingsError(
            f"No {DEFAULT_FILE} here, and {len(labs)} labs run.",
            hint=f"Set {ENV_HOSTS} to one of: {', '.join(map(str, labs))}.",
        )
    raise SettingsError(
        f"No {DEFAULT_FILE} here, and no lab runs.",
        hint=f"Copy hosts.example.toml to {DEFAULT_FILE} and fill in your host, "
        "or start the lab with `make lab-up`.",
    )


def _kind(path: Path) -> Literal["file", "other", "absent"]:
    """What is at `path`, links followed. Raises SettingsError when that cannot be told."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        # A link to nowhere is not nothing.
        return "other" if path.is_symlink() else "absent"
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.", hint=READABLE
        ) from error
    return "file" if stat.S_ISREG(mode) else "other"


def load_fleet(path: Path) -> Fleet:
    """Read a hosts file. Raises SettingsError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}.", hint=READABLE) from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: is not UTF-8: {error.reason}.", hint="Save it as UTF-8.") from error
    return with_ssh_users(parse_fleet(text, file=path))


def with_ssh_users(known: Fleet) -> Fleet:
    """The same hosts, with the user of ~/.ssh/config where the file names none. Not for a lab's file.

    Raises SettingsError when that user is no user name, or ~/.ssh/config gives two hosts one address;
    ReachError when it cannot be read.
    """
    from control import sshconfig, state  # late: both build on this module

    if state.is_lab_file(known.file):
        return known
    hosts = {}
    # Two sites behind jump hosts of their own may use one private address.
    reached: dict[tuple[str, int, str | None], str] = {}
    for name, host in known.hosts.items():
        options = sshconfig.lookup(host.address)
        address = _canonical(options.hostname or host.address)
        port = host.port if "port" in host.model_fields_set else options.port or host.port
        _refuse_shared(reached.setdefault((address, port, options.proxy), name), name, address, known.file)
        user = None if "user" in host.model_fields_set else options.user
        if user is not None and not _USER_NAME.fullmatch(user):
            raise SettingsError(
                f"~/.ssh/config: {user!r} is no user name quietport can log in with to {name}.",
                hint=f"Correct it there, or set user in {known.file}.",
            )
        hosts[name] = host.model_copy(update={"user": user}) if user else host
    return Fleet(file=known.file, hosts=hosts)


@lru_cache(maxsize=1)
def fleet() -> Fleet:
    """The hosts of this process, read once. Raises SettingsError."""
    return load_fleet(hosts_file())


def settings_for(name: str) -> HostSettings:
    """What the host called `name` is told. Raises SettingsError when the file does not name it."""
    hosts = fleet().hosts
    if name not in hosts:
        raise SettingsError(f"{fleet().file}: no host called {name!r}.{nearest(name, list(hosts))}")
    return hosts[name]
