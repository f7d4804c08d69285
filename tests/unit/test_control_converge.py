"""The closing line of a converge, from what pyinfra's log said of a host."""

from __future__ import annotations

import subprocess
import sys

# In a process of its own: pyinfra's command line patches the standard library.
PROGRAM = """
from control.converge import Errors
errors = Errors()
errors.of["web"] = [
    "web: failed: the connection is lost.",
    "Error: executed 2 commands",
    "web: undone: whether it was undone is not known: web does not answer as SSH. See `ufw`.",
]
print(errors.reason("web"))
"""


def test_what_became_of_a_change_is_a_sentence_of_its_own_with_names_as_they_are() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == (
        "failed: the connection is lost. Whether it was undone is not known: web does not answer as SSH. "
        "See `ufw`."
    )
