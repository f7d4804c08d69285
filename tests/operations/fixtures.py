"""What the fixtures of all operations share: their tags, and one test a fixture.

A folder is named MODULE.OPERATION, a file after its path. In a fixture, `!script` is the command that runs a
shell script of the module with these arguments, `!bytes` what goes to its standard input, `!waiter` the
program that waits for apt, `!sha256` the digest of a text, `!sha256-of` that of a module's constant.
`certainty` is how sure a plan is of the change; a change is certain without it.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from pyinfra_testing.operations import make_operation_tests
from pyinfra_testing.util import FakeHost

from operations import apt, common, notes

HERE = Path(__file__).parent


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


def scalar(loader: yaml.SafeLoader, node: yaml.Node) -> str:
    assert isinstance(node, yaml.ScalarNode)
    return str(loader.construct_scalar(node))


yaml.SafeLoader.add_constructor("!script", _script)
yaml.SafeLoader.add_constructor("!bytes", lambda loader, node: scalar(loader, node).encode())
yaml.SafeLoader.add_constructor("!waiter", lambda loader, node: apt.waiter())
yaml.SafeLoader.add_constructor("!sha256", lambda loader, node: digest(scalar(loader, node)))
yaml.SafeLoader.add_constructor("!sha256-of", lambda loader, node: digest(constant(scalar(loader, node))))


def tests_of(modules: Sequence[str]) -> dict[str, Any]:
    """One test class a folder of fixtures of these modules, by name."""
    folders = [path for module in modules for path in sorted(HERE.glob(f"{module}.*")) if path.is_dir()]
    return {
        f"Test_{folder.name.replace('.', '_')}": _explained(
            make_operation_tests("operations", folder.name, folder)
        )
        for folder in folders
    }


def _explained(made: Any) -> Any:
    """The same tests, which besides want a reason told to a plan for each change, and none without one."""

    class Explained(made):  # type: ignore[misc]
        def _test(self, test_name: str, test_data: dict[str, Any]) -> None:
            with patch.object(FakeHost, "current_op_hash", "it"):
                collected = notes.collect()
                try:
                    super()._test(test_name, test_data)
                finally:
                    notes.forget()
            told = [note for host in collected.of.values() for note in host.values()]
            assert len(told) == 1
            changes = bool(test_data["commands"])
            assert bool(told[0].reasons or told[0].refused) == changes, told[0]
            assert told[0].certainty == test_data.get("certainty", notes.CERTAIN), told[0]
            assert bool(told[0].on) == (told[0].certainty != notes.CERTAIN)

    Explained.__name__ = made.__name__
    return Explained


def without_fixtures(modules: Sequence[str]) -> set[str]:
    """Operations of these modules that no fixture is about."""
    operations = {
        f"{module}.{name}"
        for module in modules
        for name, value in vars(importlib.import_module(f"operations.{module}")).items()
        if hasattr(value, "_inner") and value.__module__ == f"operations.{module}"
    }
    assert operations, "no operation was found"
    return {folder for folder in operations if not list((HERE / folder).glob("*.yaml"))}
