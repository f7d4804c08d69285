"""Programs that leak on purpose, once in every way and as short-lived as a shell can: positive controls.

What they leak is a canary of their own, which is nowhere in their text: they turn letters and digits
round, so that only what they do with it can be seen.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tests.lab.tracing import Canary, Leak

_HALF = {word: len(word) // 2 for word in (string.ascii_lowercase, string.digits)}
_TURNED = str.maketrans("".join(_HALF), "".join(word[half:] + word[:half] for word, half in _HALF.items()))

# How each is seen in a trace; a copy within the private directory must not be.
IN_TRACE: Mapping[str, str] = {
    "argument": "argv",
    "variable": "environment",
    "file": "written",
    "encoded": "written",
    "loose": "written",
    "copy": "copied",
    "move": "moved",
    "name": "named",
}
FINE = "fine"

_SCRIPT = """
say() { printf %s "$1" | tr a-z0-9 n-za-m5-90-4; }
/bin/true "$(say @argument)"
V=$(say @variable) /bin/true
umask 077; mkdir -m 700 @folder @folder/private
say @file > @outside; rm @outside
say @encoded | base64 > @outside; rm @outside
mkdir -m 700 @outside; chmod 755 @outside; say @loose > @outside/x; rm -r @outside
say @copy > @folder/private/x
python3 -c 'import os; os.sendfile(1, 0, 0, 99)' < @folder/private/x > @outside; rm @outside
say @move > @folder/private/y; mv @folder/private/y @outside; rm @outside
mkdir @outside; : > @outside/$(say @name); rm -r @outside
say @fine > @folder/private/z; cp @folder/private/z @folder/private/zz
rm -r @folder
"""


@dataclass(frozen=True)
class Spy:
    """A script and what it leaks, by the way it does."""

    leaks: Mapping[str, Canary]
    text: str
    """Shell text; it leaves nothing behind."""

    @staticmethod
    def in_folder(folder: str, *, who: str) -> Spy:
        """A spy called `who`, that works with `folder` and `folder`.out; neither must be there."""
        found = {way: Canary(f"{who}'s {way}", secrets.token_hex(16)) for way in (*IN_TRACE, FINE)}
        words = {way: turned(canary.core) for way, canary in found.items()}
        text = _SCRIPT
        for word, value in {**words, "folder": folder, "outside": f"{folder}.out"}.items():
            text = text.replace(f"@{word}", value)
        return Spy(found, text)

    @property
    def canaries(self) -> Sequence[Canary]:
        """All of them."""
        return list(self.leaks.values())

    def unseen(self, found: Iterable[Leak]) -> list[str]:
        """The ways of IN_TRACE that a search has missed."""
        seen = {(leak.canary, leak.how) for leak in found}
        return [way for way, how in IN_TRACE.items() if (self.leaks[way].name, how) not in seen]


def turned(text: str) -> str:
    """Lower-case letters by 13 and digits by 5; twice is the text again. `tr a-z0-9 n-za-m5-90-4` does it."""
    return text.translate(_TURNED)
