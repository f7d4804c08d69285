"""Signed apt repositories with the layout of tailscale's and Docker's, served on the lab's address.

The product derives a key's URL from the repository's exactly as for upstream's: for tailscale
`<uri>/<codename>.noarmor.gpg`, for Docker `<uri>/gpg`. Each has a signing key of its own, made for the run.
"""

from __future__ import annotations

import contextlib
import datetime
import gzip
import json
import os
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lab import debs
from lab.process import LabError, Process, alive, identify, run, spawn, step, stop, wait_until
from lab.state import locked, write

SCHEMA = 1
PORT = 8081
SERVER = Path(__file__).parent / "aptserver.py"


@dataclass(frozen=True)
class Layout:
    """What a repository of upstream's looks like from outside."""

    name: str
    path: str
    """Path of its URI on the server."""
    component: str
    release: Mapping[str, str]
    """Fields of its Release files; {codename} is filled in. unattended-upgrades goes by them."""
    binary_key: str
    """Path of its key as plain OpenPGP below the URI, or nothing; {codename} is filled in."""
    armored_key: str
    """Path of its key as text."""


# Release fields as `apt-cache policy` shows them for upstream's: o=Tailscale,n=trixie,l=Tailscale,c=main and
# o=Docker,a=trixie,l=Docker CE,c=stable.
TAILSCALE = Layout(
    name="tailscale",
    path="tailscale/stable/debian",
    component="main",
    release={"Origin": "Tailscale", "Label": "Tailscale", "Codename": "{codename}"},
    binary_key="{codename}.noarmor.gpg",
    armored_key="{codename}.gpg",
)
DOCKER = Layout(
    name="docker",
    path="docker/linux/debian",
    component="stable",
    release={"Origin": "Docker", "Label": "Docker CE", "Suite": "{codename}"},
    binary_key="",
    armored_key="gpg",
)
LAYOUTS = (TAILSCALE, DOCKER)


@dataclass(frozen=True)
class Record:
    """The content of apt.json: what another process needs to find the repositories again."""

    address: str
    port: int
    cache: str
    fingerprints: Mapping[str, str]
    server: Process | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "schema": SCHEMA,
            "address": self.address,
            "port": self.port,
            "cache": self.cache,
            "fingerprints": dict(self.fingerprints),
            "server": self.server and self.server.to_json(),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Record:
        """What `to_json` wrote. Raises LabError for another schema."""
        if value.get("schema") != SCHEMA:
            raise LabError(f"apt.json has schema {value.get('schema')!r}, this lab reads {SCHEMA}.")
        return Record(
            address=value["address"],
            port=int(value["port"]),
            cache=value["cache"],
            fingerprints=value["fingerprints"],
            server=value["server"] and Process.from_json(value["server"]),
        )


class AptRepo:
    """The repositories of one run. Every method may be called from any process that has attached to it."""

    def __init__(self, run_dir: Path, cache: Path) -> None:
        """`cache` is where packages are kept once they are made."""
        self.run_dir = run_dir
        self.cache = cache
        self.directory = run_dir / "apt"
        self.www = self.directory / "www"
        self.faults = self.directory / "faults.json"

    @staticmethod
    def attach(run_dir: Path) -> AptRepo:
        """The repositories that some process served for this run. Raises LabError when there are none."""
        record = _read(run_dir / "apt")
        if record is None:
            raise LabError(f"No apt repositories in {run_dir}.", hint="`python -m lab up` starts them.")
        return AptRepo(run_dir, Path(record.cache))

    def serve(self, address: str, port: int = PORT) -> None:
        """Publish tailscale's repository and serve it on `address`; what is up already stays as it is.

        Docker's is served too once `publish_docker` has filled it. Raises LabError that says what failed.
        """
        self.www.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(self.directory / ".lock"):
            record = _read(self.directory) or Record(
                address=address, port=port, cache=str(self.cache), fingerprints=self._make_keys()
            )
            self._save(record)
        if not self._release(TAILSCALE, debs.CODENAMES[0]).is_file():
            self.publish_tailscale()
        with locked(self.directory / ".lock"):
            record = self._record
            if record.server is None or not alive(record.server):
                self._start_server(record)

    def stop(self) -> None:
        """End the server and remove the repositories. Does nothing when there are none."""
        record = None
        with contextlib.suppress(LabError):
            record = _read(self.directory)
        recorded = [record.server] if record and record.server else []
        for process in [*recorded, *self._unrecorded()]:
            stop(process)
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def running(self) -> bool:
        """Whether the server is alive."""
        record = _read(self.directory)
        return record is not None and record.server is not None and alive(record.server)

    @property
    def tailscale_uri(self) -> str:
        """URI for sources.list of tailscale's repository."""
        return self._uri(TAILSCALE)

    @property
    def docker_uri(self) -> str:
        """URI for sources.list of Docker's repository: empty until `publish_docker`."""
        return self._uri(DOCKER)

    @property
    def tailscale_fingerprint(self) -> str:
        """Fingerprint of the primary key that signs tailscale's repository, 40 hex digits."""
        return self._record.fingerprints[TAILSCALE.name]

    @property
    def docker_fingerprint(self) -> str:
        """Fingerprint of the primary key that signs Docker's repository, 40 hex digits."""
        return self._record.fingerprints[DOCKER.name]

    def publish_tailscale(self, version: str | None = None) -> None:
        """Add a version of tailscale, the pinned one by default; those that are there stay."""
        package = debs.tailscale_deb(self.cache, version)
        with step(f"publishing {package.name}"):
            self._publish(TAILSCALE, {codename: [package] for codename in debs.CODENAMES})

    def publish_docker(self) -> None:
        """Fill Docker's repository; the first time on a machine its packages are made (about a minute)."""
        packages = {codename: debs.docker_debs(self.cache, codename) for codename in debs.CODENAMES}
        with step("publishing Docker's packages"):
            self._publish(DOCKER, packages)

    def sign_again(
        self, *, valid_until: datetime.datetime | None, codenames: Sequence[str] = debs.CODENAMES
    ) -> None:
        """Give Release files a last day, or none: one in the past makes apt refuse the repository."""
        for layout in LAYOUTS:
            present = [name for name in codenames if self._release(layout, name).is_file()]
            with locked(self.directory / ".lock"):
                for codename in present:
                    self._index(layout, codename, valid_until)

    def set_faults(self, faults: Sequence[Mapping[str, str]]) -> None:
        """Make the server misbehave from now on (see lab.aptserver); with none all is well again."""
        write(self.faults, json.dumps([dict(fault) for fault in faults]))

    @property
    def _record(self) -> Record:
        record = _read(self.directory)
        if record is None:
            raise LabError(f"No apt repositories in {self.run_dir}.", hint="`python -m lab up` starts them.")
        return record

    def _save(self, record: Record) -> None:
        write(self.directory / "apt.json", json.dumps(record.to_json(), indent=1) + "\n")

    def _uri(self, layout: Layout) -> str:
        record = self._record
        return f"http://{record.address}:{record.port}/{layout.path}"

    def _root(self, layout: Layout) -> Path:
        return self.www / layout.path

    def _release(self, layout: Layout, codename: str) -> Path:
        return self._root(layout) / "dists" / codename / "InRelease"

    def _secret_key(self, layout: Layout) -> Path:
        return self.directory / f"{layout.name}.key"

    def _make_keys(self) -> dict[str, str]:
        fingerprints = {}
        for layout in LAYOUTS:
            root = self._root(layout)
            root.mkdir(parents=True, exist_ok=True)
            with _gpg_home() as gpg:
                owner = f"quietport lab {layout.name} <lab@quietport.invalid>"
                run([*gpg, "--passphrase", "", "--quick-generate-key", owner, "ed25519", "sign", "never"])
                fingerprints[layout.name] = fingerprint(run([*gpg, "--with-colons", "--list-keys"]).stdout)
                secret = run([*gpg, "--armor", "--export-secret-keys"]).stdout
                write(self._secret_key(layout), secret)
                for codename in debs.CODENAMES:
                    armored = root / layout.armored_key.format(codename=codename)
                    armored.unlink(missing_ok=True)
                    run([*gpg, "--armor", "--output", armored, "--export"])
                    if layout.binary_key:
                        binary = root / layout.binary_key.format(codename=codename)
                        binary.unlink(missing_ok=True)
                        run([*gpg, "--output", binary, "--export"])
        return fingerprints

    def _publish(self, layout: Layout, packages: Mapping[str, Sequence[Path]]) -> None:
        with locked(self.directory / ".lock"):
            for codename, files in packages.items():
                pool = self._root(layout) / "pool" / codename
                pool.mkdir(parents=True, exist_ok=True)
                for file in files:
                    _link(file, pool / file.name)
                self._index(layout, codename, None)

    def _index(self, layout: Layout, codename: str, valid_until: datetime.datetime | None) -> None:
        """Write and sign dists/CODENAME from what the pool has, and put it in place of the old one."""
        root = self._root(layout)
        new = Path(tempfile.mkdtemp(dir=root, prefix=".dists-"))
        try:
            new.chmod(0o755)
            binary = new / layout.component / f"binary-{debs.architecture()}"
            binary.mkdir(parents=True)
            index = run(["apt-ftparchive", "packages", f"pool/{codename}"], cwd=root, timeout=300).stdout
            (binary / "Packages").write_text(index)
            # A fixed time: the same packages give the same bytes.
            (binary / "Packages.gz").write_bytes(gzip.compress(index.encode(), mtime=0))
            options = release_options(layout, codename, debs.architecture())
            text = run(["apt-ftparchive", *options, "release", "."], cwd=new, timeout=60).stdout
            (new / "Release").write_text(with_last_day(text, valid_until))
            self._sign(layout, new)
            place = root / "dists" / codename
            place.parent.mkdir(exist_ok=True)
            shutil.rmtree(place, ignore_errors=True)
            new.rename(place)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise

    def _sign(self, layout: Layout, directory: Path) -> None:
        with _gpg_home() as gpg:
            run([*gpg, "--import", self._secret_key(layout)])
            release = directory / "Release"
            run([*gpg, "--output", directory / "InRelease", "--clear-sign", release])
            run([*gpg, "--armor", "--output", directory / "Release.gpg", "--detach-sign", release])

    def _start_server(self, record: Record) -> None:
        log = self.run_dir / "logs" / "apt.log"
        process = spawn([sys.executable, "-I", *self._server_arguments(record)], log=log)
        self._save(replace(record, server=process))

        def answered() -> bool:
            if not alive(process):
                said = "\n".join(log.read_text(errors="replace").strip().splitlines()[-4:])
                raise LabError(f"The apt server ended at once: {said}", hint=f"Its log: {log}")
            return _answers(f"{self.tailscale_uri}/dists/{debs.CODENAMES[0]}/InRelease")

        wait_until(answered, timeout=15, what=f"the apt server answers at {self.tailscale_uri}")

    def _server_arguments(self, record: Record) -> list[str]:
        return [str(SERVER), str(self.www), record.address, str(record.port), str(self.faults)]

    def _unrecorded(self) -> list[Process]:
        """Servers of this run that a killed `serve` had no time to write down."""
        ours = os.fsencode(f"\0{SERVER}\0{self.www}\0")
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, LabError):
                if ours in (entry / "cmdline").read_bytes():
                    found.append(identify(int(entry.name)))
        return found


def release_options(layout: Layout, codename: str, arch: str) -> list[str]:
    """Options of apt-ftparchive(1) that give a Release file the fields of upstream's."""
    fields = {key: value.format(codename=codename) for key, value in layout.release.items()}
    fields |= {"Architectures": arch, "Components": layout.component}
    return [
        word for key, value in fields.items() for word in ("-o", f"APT::FTPArchive::Release::{key}={value}")
    ]


def with_last_day(release: str, last: datetime.datetime | None) -> str:
    """A Release file's text with the moment it expires; apt-ftparchive has no option for one."""
    if last is None:
        return release
    moment = last.astimezone(datetime.UTC).strftime("%a, %d %b %Y %H:%M:%S UTC")
    return f"Valid-Until: {moment}\n{release}"


def fingerprint(colons: str) -> str:
    """Fingerprint of the only primary key in gpg's --with-colons output. Raises LabError otherwise."""
    lines = [line.split(":") for line in colons.splitlines()]
    primaries = [number for number, line in enumerate(lines) if line[0] == "pub"]
    if len(primaries) != 1:
        raise LabError(f"A keyring with {len(primaries)} primary keys, where one was made.")
    for line in lines[primaries[0] :]:
        if line[0] == "fpr":
            return line[9]
    raise LabError("gpg showed a key without a fingerprint.")


@contextlib.contextmanager
def _gpg_home() -> Iterator[list[str]]:
    """A gpg command with a keyring of its own, which is gone afterwards with the agent it started.

    In a short directory: gpg-agent's socket is in it, and its path may have 107 bytes (unix(7)).
    """
    home = tempfile.mkdtemp(prefix="qpl-gpg-")
    try:
        yield ["gpg", "--homedir", home, "--batch", "--no-tty", "--quiet", "--pinentry-mode", "loopback"]
    finally:
        run(["gpgconf", "--homedir", home, "--kill", "all"], check=False)
        shutil.rmtree(home, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    """The file under a second name, or a copy where the cache is on another file system."""
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _answers(url: str) -> bool:
    # No proxy: a machine with one configured would ask it for the lab's private address.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _read(directory: Path) -> Record | None:
    try:
        return Record.from_json(json.loads((directory / "apt.json").read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise LabError(f"{directory / 'apt.json'} cannot be read: {error!r}.") from error
