"""What is particular to each variant, before its converge and after: a check for each of `lab.variants`."""

from __future__ import annotations

from collections.abc import Mapping

from tests.lab import checks_machine, checks_ssh
from tests.lab.variants import Check

CHECKS: Mapping[str, Check] = {**checks_ssh.CHECKS, **checks_machine.CHECKS}
