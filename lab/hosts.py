"""The files a run offers its users: hosts.toml for the project's commands, ssh_config for OpenSSH."""

from __future__ import annotations

import json
import secrets
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.aptrepo import AptRepo
from lab.process import LabError, run
from lab.state import Run, Target, write
from lab.tailnet import Tailnet

# What headscale hands out (its prefixes.v4 and v6): addresses of these go through the control node.
TAILNET_PATTERNS = ("100.64.*", "fd7a:115c:a1e0:*")
EXAMPLE_SECRET = "/etc/ai-ops-runner/secrets/openai_api_key"  # noqa: S105, a path


@dataclass(frozen=True)
class Services:
    """Where the run's services are, as hosts.toml names them."""

    login_server: str
    tailnet_proxy: str
    tailscale_repository: str
    tailscale_key_fingerprint: str
    docker_repository: str
    docker_key_fingerprint: str

    @staticmethod
    def of(tailnet: Tailnet, repository: AptRepo) -> Services:
        """Those of a run, which are up."""
        return Services(
            login_server=tailnet.login_server,
            tailnet_proxy=tailnet.proxy_command,
            tailscale_repository=repository.tailscale_uri,
            tailscale_key_fingerprint=repository.tailscale_fingerprint,
            docker_repository=repository.docker_uri,
            docker_key_fingerprint=repository.docker_fingerprint,
        )

    def to_json(self) -> dict[str, str]:
        """Keys of hosts.toml."""
        return dict(self.__dict__)


def hosts_toml(
    targets: Iterable[Target],
    *,
    services: Services,
    identity_file: Path,
    auth_keys: Mapping[str, Path],
    example_secret: Path,
    more: Mapping[str, Mapping[str, Any]],
) -> str:
    """The text of hosts.toml: what all targets share in [defaults], address and key of each in its own.

    `more` has the keys that a host needs besides, or instead; None takes one away.
    """
    lines = ["# Written by the lab; `python -m lab up` writes it again.", "", "[defaults]"]
    shared = {"identity_file": str(identity_file), **services.to_json()}
    lines += [f"{key} = {_string(value)}" for key, value in shared.items()]
    lines += ["", "[defaults.secrets]", f"{_string(EXAMPLE_SECRET)} = {_string(f'file:{example_secret}')}"]
    for target in targets:
        own: dict[str, Any] = {"address": target.public_ip}
        if key := auth_keys.get(target.name):
            own["auth_key"] = f"file:{key}"
        # Strings, numbers, booleans and lists of them are written alike in JSON and in TOML.
        own |= more.get(target.name, {})
        lines += ["", f"[hosts.{target.name}]"]
        lines += [f"{name} = {json.dumps(value)}" for name, value in own.items() if value is not None]
    return "\n".join(lines) + "\n"


def ssh_config(
    run_: Run,
    targets: Iterable[Target],
    *,
    tailnet_proxy: str,
    tailnet: Mapping[str, Iterable[str]],
    users: Mapping[str, str] | None = None,
) -> str:
    """OpenSSH configuration: a name takes the way that is open, an address the way that it is on.

    `tailnet` has the tailnet addresses of the targets that joined, `users` whom to log in as where that is
    not root. One host key is expected on all ways.
    """
    shared = [
        f"    IdentityFile {_quoted(run_.keys / 'operator')}",
        "    IdentitiesOnly yes",
        f"    UserKnownHostsFile {_quoted(run_.directory / 'known_hosts')}",
        "    StrictHostKeyChecking accept-new",
        "    LogLevel ERROR",
    ]
    blocks: list[str] = []
    for target in targets:
        # ssh_config(5) expands %: a literal one is doubled.
        carry = shlex.join([sys.executable, "-m", "lab", "--run", run_.id, "carry", target.name]).replace(
            "%", "%%"
        )
        alias = f"    HostKeyAlias {target.name}"
        common = [f"    User {(users or {}).get(target.name, 'root')}", *shared]
        blocks += [f"Host {target.name}", alias, f"    ProxyCommand {carry} %p", *common, ""]
        blocks += [f"Host {target.public_ip} {target.public_ip6}", alias, *common, ""]
        if addresses := list(tailnet.get(target.name, ())):
            blocks += [f"Host {' '.join(addresses)}", alias, f"    ProxyCommand {tailnet_proxy}", *common, ""]
    others = ["    User root", *shared]
    blocks += [f"Host {' '.join(TAILNET_PATTERNS)}", f"    ProxyCommand {tailnet_proxy}", *others]
    return "\n".join(blocks) + "\n"


def example_secret(run_: Run) -> Path:
    """A made-up secret, so that the lab's hosts show the worked example."""
    path = run_.keys / "example-secret"
    if not path.is_file():
        write(path, f"sk-lab-{secrets.token_hex(16)}")
    return path


def forget_host_key(run_: Run, name: str) -> None:
    """A target made anew has keys of its own; what the old one showed is forgotten."""
    known = run_.directory / "known_hosts"
    if known.is_file():
        run(["ssh-keygen", "-q", "-R", name, "-f", known], check=False)


def guard(path: Path) -> Run:
    """The run whose hosts file this is. Raises LabError when a host in it is not a target of that run."""
    import tomllib

    run_ = Run.of_hosts_file(path)
    targets = run_.read().targets
    for name, table in tomllib.loads(path.read_text()).get("hosts", {}).items():
        target = targets.get(name)
        if target is None or table.get("address") not in (target.public_ip, target.public_ip6):
            raise LabError(f"{path}: {name} is not a target of lab run {run_.id!r}; nothing is done to it.")
    return run_


def _string(value: str) -> str:
    """A TOML basic string; JSON's escapes are a part of TOML's."""
    return json.dumps(value)


def _quoted(path: Path) -> str:
    text = str(path).replace("%", "%%")
    return f'"{text}"'
