"""Debian packages as their makers ship them, made here because the lab has no Internet.

tailscale's comes from upstream's own packager. Docker's are Debian's programs in packages with the
names, paths, dependencies and conflicts of Docker's own, so that `docker_source = "docker"` is tried
for real: another repository, another key, other packages, another path of dockerd.
"""

from __future__ import annotations

import re
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab import toolchain
from lab.cache import cached, digest
from lab.process import LabError, output, run, step

CODENAMES = ("trixie", "bookworm")
RELEASES = {"trixie": "13", "bookworm": "12"}
DOWNLOAD_TIMEOUT_S = 900

# tailscale.com, release/dist/unixpkgs/pkgs.go: what upstream's own .deb says.
TAILSCALE_DEPENDS = "iptables"
TAILSCALE_RECOMMENDS = "tailscale-archive-keyring (>= 1.35.181),iproute2"
TAILSCALE_REPLACES = "tailscale-relay"
TAILSCALE_CONFIG = "/etc/default/tailscaled"


@dataclass(frozen=True)
class Repack:
    """One package in the shape of Docker's own, made of files from Debian's."""

    name: str
    version_of: str
    """The Debian package whose upstream version this one has."""
    files: Mapping[str, tuple[str, str]]
    """Path in the new package = Debian package and path in it."""
    control: Mapping[str, str]
    """Relations, as in Docker's packaging (docker/docker-ce-packaging and docker/containerd-packaging on
    GitHub, debian/control), less what a lab has no use for."""
    units: tuple[str, ...] = ()
    """systemd units that are enabled and started."""
    epoch: str = ""
    config_files: tuple[str, ...] = ()
    postinst: str = ""
    """Shell that runs when the package is configured, before its units start."""


_PLUGINS = "usr/libexec/docker/cli-plugins"
_UNITS = "usr/lib/systemd/system"
_OLD = "docker (<< 1.5~), docker-engine, docker.io"
DOCKER_PACKAGES = (
    Repack(
        name="containerd.io",
        version_of="containerd",
        files={
            "usr/bin/containerd": ("containerd", "usr/bin/containerd"),
            "usr/bin/containerd-shim-runc-v2": ("containerd", "usr/bin/containerd-shim-runc-v2"),
            "usr/bin/ctr": ("containerd", "usr/bin/ctr"),
            "usr/bin/runc": ("runc", "usr/sbin/runc"),
            f"{_UNITS}/containerd.service": ("containerd", f"{_UNITS}/containerd.service"),
        },
        control={
            "Depends": "libc6 (>= 2.34), libseccomp2 (>= 2.5.0)",
            "Provides": "containerd, runc",
            "Conflicts": "containerd, runc",
            "Replaces": "containerd, runc",
        },
        units=("containerd.service",),
    ),
    Repack(
        name="docker-ce",
        version_of="docker.io",
        epoch="5:",
        files={
            "usr/bin/dockerd": ("docker.io", "usr/sbin/dockerd"),
            "usr/bin/docker-proxy": ("docker.io", "usr/sbin/docker-proxy"),
            "usr/bin/docker-init": ("tini", "usr/bin/tini-static"),
            f"{_UNITS}/docker.service": ("docker.io", f"{_UNITS}/docker.service"),
            f"{_UNITS}/docker.socket": ("docker.io", f"{_UNITS}/docker.socket"),
            "etc/default/docker": ("docker.io", "etc/default/docker"),
        },
        control={
            "Depends": "containerd.io (>= 1.6.4), docker-ce-cli, iptables, libc6 (>= 2.34), libsystemd0",
            "Recommends": "apparmor, ca-certificates, git, pigz, procps, xz-utils",
            "Conflicts": _OLD,
            "Replaces": "docker-engine",
        },
        units=("docker.service", "docker.socket"),
        config_files=("/etc/default/docker",),
        postinst="getent group docker > /dev/null || groupadd --system docker",
    ),
    Repack(
        name="docker-ce-cli",
        version_of="docker-cli",
        epoch="5:",
        files={"usr/bin/docker": ("docker-cli", "usr/bin/docker")},
        control={
            "Depends": "libc6 (>= 2.34)",
            "Recommends": "docker-buildx-plugin, docker-compose-plugin",
            "Conflicts": _OLD,
            "Replaces": "docker-ce (<< 5:0)",
            "Breaks": "docker-ce (<< 5:0)",
        },
    ),
    Repack(
        name="docker-buildx-plugin",
        version_of="docker-buildx",
        files={f"{_PLUGINS}/docker-buildx": ("docker-buildx", f"{_PLUGINS}/docker-buildx")},
        control={
            "Depends": "libc6 (>= 2.34)",
            "Enhances": "docker-ce-cli",
            "Replaces": "docker-ce-cli",
        },
    ),
    Repack(
        name="docker-compose-plugin",
        version_of="docker-compose",
        files={f"{_PLUGINS}/docker-compose": ("docker-compose", f"{_PLUGINS}/docker-compose")},
        control={
            "Depends": "libc6 (>= 2.34)",
            "Enhances": "docker-ce-cli",
            "Conflicts": "docker-compose",
            "Replaces": "docker-compose",
            "Breaks": "docker-compose",
        },
    ),
)


def architecture() -> str:
    """This machine's architecture, as Debian calls it."""
    return output(["dpkg", "--print-architecture"], timeout=30)


# tailscale


def tailscale_deb(cache: Path, version: str | None = None) -> Path:
    """tailscale's package, of the pinned version or of another one for upgrades.

    Raises LabError when the tools cannot be built or upstream's packager fails.
    """
    tools = toolchain.build(cache) if version is None else toolchain.build_version(cache, version)
    name = f"tailscale_{tools.version}_{architecture()}.deb"
    recipe = (TAILSCALE_DEPENDS, TAILSCALE_RECOMMENDS, TAILSCALE_REPLACES, name)
    key = digest(toolchain.tools_key(), *recipe)
    return (
        cached(cache, f"deb-tailscale-{tools.version}", key, lambda place: _mkpkg(tools, place / name)) / name
    )


def mkpkg_argv(tools: toolchain.Tools, out: Path, arch: str) -> list[str]:
    """Command line of upstream's packager that gives its own .deb its content."""
    source = tools.packaging
    units = "/lib/systemd/system"
    files = {
        tools.tailscale: "/usr/bin/tailscale",
        tools.tailscaled: "/usr/sbin/tailscaled",
        **{
            source / "cmd/tailscaled" / unit: f"{units}/{unit}"
            for unit in ("tailscaled.service", "tailscale-online.target", "tailscale-wait-online.service")
        },
    }
    scripts = source / "release/deb"
    return [
        str(tools.mkpkg),
        f"--out={out}",
        "--type=deb",
        "--name=tailscale",
        f"--arch={arch}",
        f"--version={tools.version}",
        f"--files={','.join(f'{path}:{target}' for path, target in files.items())}",
        f"--configs={source / 'cmd/tailscaled/tailscaled.defaults'}:{TAILSCALE_CONFIG}",
        f"--postinst={scripts / 'debian.postinst.sh'}",
        f"--prerm={scripts / 'debian.prerm.sh'}",
        f"--postrm={scripts / 'debian.postrm.sh'}",
        f"--depends={TAILSCALE_DEPENDS}",
        f"--recommends={TAILSCALE_RECOMMENDS}",
        f"--replaces={TAILSCALE_REPLACES}",
    ]


def _mkpkg(tools: toolchain.Tools, out: Path) -> None:
    with step(f"packaging tailscale {tools.version}"), tempfile.TemporaryDirectory(dir=out.parent) as work:
        made, tree = Path(work) / "made.deb", Path(work) / "tree"
        run(mkpkg_argv(tools, made, architecture()), timeout=300)
        # mkpkg forgets that --configs are configuration files (it types them as plain ones); upstream's
        # release job does not, and dpkg must not overwrite an edited one on an upgrade.
        run(["dpkg-deb", "--raw-extract", made, tree])
        (tree / "DEBIAN/conffiles").write_text(TAILSCALE_CONFIG + "\n")
        _build(tree, out)


# Docker


def docker_debs(cache: Path, codename: str) -> list[Path]:
    """Docker's packages for a Debian release; the first time their parts are fetched from Debian.

    All programs are trixie's, for both releases, as Docker ships one version for both: they need a C
    library of 2.34, bookworm has 2.36. The exception is runc, whose trixie build needs 2.38: bookworm gets
    its own. So compose is v2 on bookworm too, which Debian itself does not have there.
    Raises LabError for a release it does not know, or when Debian's packages cannot be had.
    """
    if codename not in CODENAMES:
        raise LabError(f"No Docker packages for {codename!r}: the lab knows {', '.join(CODENAMES)}.")
    key = digest(
        repr(DOCKER_PACKAGES), repr(_wanted()), maintainer_script("postinst", (), ""), architecture()
    )
    place = cached(cache, f"debs-docker-{codename}", key, lambda place: _repack_all(place, cache, codename))
    return sorted(place.glob("*.deb"))


def _wanted() -> list[str]:
    return sorted({package for repack in DOCKER_PACKAGES for package, _ in repack.files.values()})


def _repack_all(place: Path, cache: Path, codename: str) -> None:
    wanted = _wanted()
    sources = _from_debian(cache, "trixie", wanted)
    if codename != "trixie":
        sources["runc"] = _from_debian(cache, codename, ["runc"])["runc"]
    with (
        step(f"packaging Docker as its makers do, for {codename}"),
        tempfile.TemporaryDirectory(dir=place.parent, prefix=".debs-work-") as work,
    ):
        trees = {package: Path(work) / "debian" / package for package in wanted}
        for package, tree in trees.items():
            tree.parent.mkdir(exist_ok=True)
            run(["dpkg-deb", "--extract", sources[package], tree])
        for repack in DOCKER_PACKAGES:
            version = output(["dpkg-deb", "--field", sources[repack.version_of], "Version"])
            _repack(repack, trees, Path(work) / repack.name, place, docker_version(repack, version, codename))


def docker_version(repack: Repack, debian_version: str, codename: str) -> str:
    """Version in Docker's form, such as 5:26.1.5-1~debian.13~trixie. Raises LabError for an odd one."""
    found = re.match(r"(?:\d+:)?(\d+(?:\.\d+)+)", debian_version)
    if found is None:
        raise LabError(f"{repack.version_of}: version {debian_version!r} does not begin with numbers.")
    return f"{repack.epoch}{found.group(1)}-1~debian.{RELEASES[codename]}~{codename}"


def _repack(repack: Repack, trees: Mapping[str, Path], tree: Path, place: Path, version: str) -> None:
    for target, (package, path) in repack.files.items():
        (tree / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(trees[package] / path, tree / target)
    service = tree / _UNITS / "docker.service"
    if service.is_file():
        service.write_text(docker_service(service.read_text()))
    control = tree / "DEBIAN"
    control.mkdir()
    arch = architecture()
    (control / "control").write_text(control_text(repack, version, arch))
    if repack.config_files:
        (control / "conffiles").write_text("".join(f"{path}\n" for path in repack.config_files))
    if repack.units:
        for kind in ("postinst", "prerm", "postrm"):
            script = control / kind
            script.write_text(maintainer_script(kind, repack.units, repack.postinst))
            script.chmod(0o755)
    # A file's name has no epoch, like in Docker's repository.
    _build(tree, place / f"{repack.name}_{version.removeprefix(repack.epoch)}_{arch}.deb")


def docker_service(text: str) -> str:
    """Docker's unit from Debian's: dockerd in /usr/bin, and no options from /etc/default."""
    lines = [line for line in text.splitlines() if not line.startswith("EnvironmentFile=")]
    return (
        "\n".join(lines).replace("/usr/sbin/dockerd", "/usr/bin/dockerd").replace(" $DOCKER_OPTS", "") + "\n"
    )


def control_text(repack: Repack, version: str, arch: str) -> str:
    """The control file of a package."""
    fields = {
        "Package": repack.name,
        "Version": version,
        "Architecture": arch,
        "Maintainer": "quietport lab <lab@quietport.invalid>",
        "Section": "admin",
        "Priority": "optional",
        **repack.control,
        "Description": f"Debian's build of {repack.version_of}, packaged as {repack.name} for a lab",
    }
    return "".join(f"{key}: {value}\n" for key, value in fields.items())


_SCRIPTS = {
    "postinst": """\
if [ "$1" = configure ]; then
    {extra}
    for unit in {units}; do
        deb-systemd-helper unmask "$unit" > /dev/null || :
        if deb-systemd-helper --quiet was-enabled "$unit"; then
            deb-systemd-helper enable "$unit" > /dev/null || :
        else
            deb-systemd-helper update-state "$unit" > /dev/null || :
        fi
    done
    if [ -d /run/systemd/system ]; then
        systemctl --system daemon-reload > /dev/null || :
        if [ -n "$2" ]; then action=restart; else action=start; fi
        deb-systemd-invoke "$action" {units} > /dev/null || :
    fi
fi
""",
    "prerm": """\
if [ "$1" = remove ] && [ -d /run/systemd/system ]; then
    deb-systemd-invoke stop {units} > /dev/null || :
fi
""",
    "postrm": """\
if [ "$1" = remove ] && [ -d /run/systemd/system ]; then
    systemctl --system daemon-reload > /dev/null || :
fi
if [ "$1" = purge ] && command -v deb-systemd-helper > /dev/null; then
    deb-systemd-helper purge {units} > /dev/null || :
fi
""",
}


def maintainer_script(kind: str, units: Sequence[str], extra: str) -> str:
    """postinst, prerm or postrm, doing what debhelper's dh_installsystemd makes packages do."""
    body = _SCRIPTS[kind].format(units=" ".join(units), extra=extra or ":")
    return f"#!/bin/sh\nset -e\n{body}"


def _from_debian(cache: Path, codename: str, packages: Iterable[str]) -> dict[str, Path]:
    """Debian's own packages of a release, by name."""
    names = sorted(packages)
    key = digest(codename, architecture(), *names)
    place = cached(cache, f"debian-{codename}", key, lambda place: _download(place, codename, names))
    return {path.name.partition("_")[0]: path for path in place.glob("*.deb")}


def _download(place: Path, codename: str, names: Sequence[str]) -> None:
    with step(f"fetching {', '.join(names)} from Debian {codename}"):
        # mmdebstrap sets up apt for that release, with the same mirror and keyring as the lab's images, and
        # is stopped short of installing anything.
        get = f'APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get -qq download {shlex.join(names)}'
        fetch = f"cd {shlex.quote(str(place))} && {get}"
        argv = [
            "mmdebstrap",
            "--quiet",
            "--variant=custom",
            f"--customize-hook={fetch}",
            codename,
            "/dev/null",
        ]
        run(argv, timeout=DOWNLOAD_TIMEOUT_S)
    found = {path.name.partition("_")[0] for path in place.glob("*.deb")}
    if missing := set(names) - found:
        raise LabError(f"Debian {codename} did not give: {', '.join(sorted(missing))}.")


def _build(tree: Path, out: Path) -> None:
    # Light compression: the package travels over a bridge, once.
    run(["dpkg-deb", "--root-owner-group", "-Zgzip", "-z1", "--build", tree, out], timeout=600)
