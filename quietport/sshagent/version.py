"""Which version this is: its number, and a digest that is another when the source is."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from importlib.resources.abc import Traversable

from quietport import __version__


def version() -> str:
    """Such as 0.1.0+3f2a91c04d5e; the same from a zipapp and from the checkout it was built of."""
    digest = hashlib.sha256()
    for name, content in sorted(_sources(files("quietport"), "")):
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return f"{__version__}+{digest.hexdigest()[:12]}"


def _sources(folder: Traversable, prefix: str) -> list[tuple[str, bytes]]:
    found = []
    for entry in folder.iterdir():
        name = f"{prefix}{entry.name}"
        if entry.is_dir():
            found += _sources(entry, f"{name}/")
        elif name.endswith(".py"):
            found.append((name, entry.read_bytes()))
    return found
