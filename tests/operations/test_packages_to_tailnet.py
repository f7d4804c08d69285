"""Every path of the operations on files, apt, users, programs, docker and the tailnet, one fixture each.

A folder is named MODULE.OPERATION, a file after its path. In a fixture, `!script` is the command that runs a
shell script of the module with these arguments, `!bytes` what goes to its standard input, `!waiter` the
program that waits for apt, `!sha256` the digest of a text, `!sha256-of` that of a module's constant.
"""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyinfra_testing.operations import make_operation_tests

from operations import apt, common, gate, tailnet

HERE = Path(__file__).parent
MODULES = ("files", "apt", "users", "programs", "tailnet", "docker")


def constant(name: str) -> Any:
    """The value of MODULE.NAME in the package of operations."""
    module, _, attribute = name.partition(".")
    return getattr(importlib.import_module(f"operations.{module}"), attribute)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _script(loader: yaml.SafeLoader, node: yaml.Node) -> str:
    assert isinstance(node, yaml.SequenceNode)
    name, *args = loader.construct_sequence(node, deep=True)
    return common.script(constant(name), *args).get_raw_value()


def _scalar(loader: yaml.SafeLoader, node: yaml.Node) -> str:
    assert isinstance(node, yaml.ScalarNode)
    return str(loader.construct_scalar(node))


yaml.SafeLoader.add_constructor("!script", _script)
yaml.SafeLoader.add_constructor("!bytes", lambda loader, node: _scalar(loader, node).encode())
yaml.SafeLoader.add_constructor("!waiter", lambda loader, node: apt.waiter())
yaml.SafeLoader.add_constructor("!sha256", lambda loader, node: digest(_scalar(loader, node)))
yaml.SafeLoader.add_constructor("!sha256-of", lambda loader, node: digest(constant(_scalar(loader, node))))


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an operation asks besides facts: the way the host is reached, what the operator knows."""
    monkeypatch.setattr(gate, "reached_by", lambda host: "public")
    monkeypatch.setattr(tailnet, "known_addresses", lambda name: ["100.64.0.7", "fd7a:115c:a1e0::7"])


FOLDERS = [path for module in MODULES for path in sorted(HERE.glob(f"{module}.*")) if path.is_dir()]
for folder in FOLDERS:
    class_name = f"Test_{folder.name.replace('.', '_')}"
    globals()[class_name] = make_operation_tests("operations", folder.name, folder)


def test_every_operation_has_fixtures() -> None:
    operations = {
        f"{module}.{name}"
        for module in MODULES
        for name, value in vars(importlib.import_module(f"operations.{module}")).items()
        if hasattr(value, "_inner") and value.__module__ == f"operations.{module}"
    }
    assert operations, "no operation was found"
    assert {folder for folder in operations if not list((HERE / folder).glob("*.yaml"))} == set()
