"""Fixtures of the unit tests that talk to a real sshd."""

from tests.unit.control_sshd import (
    _host_keys,
    _person_account,
    operator,
    person,
    relay,
    server,
    tailscale,
)

__all__ = ["_host_keys", "_person_account", "operator", "person", "relay", "server", "tailscale"]
