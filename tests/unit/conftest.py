"""Fixtures of the unit tests that talk to a real sshd; properties have no time limit on a busy machine."""

from hypothesis import settings

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

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
