"""Things that are made once and kept by the hash of what they are made from."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from lab.state import locked


def digest(*parts: str | bytes) -> str:
    """Hex digest of the parts, each with its length, so that moving a byte between two parts counts."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "big") + data)
    return total.hexdigest()


def cached(cache: Path, name: str, key: str, fill: Callable[[Path], None]) -> Path:
    """The directory `cache/NAME-KEY`, made by `fill(empty directory)` when it is not there yet.

    Two runs that want the same wait for one another; what `fill` leaves half done is never used. Raises
    what `fill` raises.
    """
    place = cache / f"{name}-{key[:16]}"
    if place.is_dir():
        return place
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(cache / f".{name}.lock"):
        if place.is_dir():
            return place
        for left_over in cache.glob(f".{name}.work-*"):
            # Whoever made it held this lock: it was killed.
            shutil.rmtree(left_over, ignore_errors=True)
        work = Path(tempfile.mkdtemp(dir=cache, prefix=f".{name}.work-"))
        try:
            fill(work)
            work.rename(place)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    return place
