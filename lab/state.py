"""What a lab run has made, written down before it is made, so that `down` finds it after a crash too.

A run is a directory `control.labs.lab_root()/RUN_ID` with `lab.json`:
`{"schema": 1, "run_id", "tag", "engine": str|null, "networks": {purpose: {...}}, "targets": {name: {...}}}`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from control.labs import lab_root
from lab.process import LabError

SCHEMA = 1
ENV_RUN = "QUIETPORT_LAB_RUN"
ENV_CACHE = "QUIETPORT_LAB_CACHE"
_RUN_ID = re.compile(r"^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$")


@dataclass(frozen=True)
class Subnet:
    """An IPv4 /24 and a ULA IPv6 /64 that one lab bridge has; this machine is host 1 of both."""

    bridge: str
    ipv4: str
    """Network in CIDR form, 10.213.N.0/24."""
    ipv6: str
    """Network in CIDR form, fd71:7069:6574:N::/64."""

    def host4(self, number: int) -> str:
        """IPv4 address of host `number`, 1 to 254."""
        return f"{self.ipv4.rpartition('.')[0]}.{number}"

    def host6(self, number: int) -> str:
        """IPv6 address of host `number`, written with the same decimal digits as its IPv4 address."""
        return f"{self.ipv6.partition('/')[0]}{number}"


@dataclass(frozen=True)
class Target:
    """A disposable host of a run."""

    name: str
    kind: str
    """container or vm."""
    distro: str
    """Debian's code name: trixie or bookworm."""
    public_ip: str
    public_ip6: str
    bridge: str
    """The bridge on this machine that carries the target's public network."""
    namespace: str
    """Network namespace of the public side: a neighbour of the target that is not on the tailnet."""
    peer_ip: str
    """IPv4 address of the public side."""
    peer_ip6: str
    state: str = "creating"
    """creating, running, stopped or failed."""
    detail: Mapping[str, str] = field(default_factory=dict)
    """What only the target's kind needs to know."""


@dataclass(frozen=True)
class RunState:
    """The content of lab.json."""

    run_id: str
    tag: str
    """8 hex digits in the name of everything the run makes: two labs never share one."""
    engine: str | None = None
    """Docker's socket (unix://...), "default" for the machine's own daemon, None when not chosen yet."""
    networks: Mapping[str, Subnet] = field(default_factory=dict)
    targets: Mapping[str, Target] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values for lab.json."""
        return {"schema": SCHEMA, **asdict(self)}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> RunState:
        """What `to_json` wrote. Raises LabError for another schema."""
        if value.get("schema") != SCHEMA:
            raise LabError(f"lab.json has schema {value.get('schema')!r}, this lab reads {SCHEMA}.")
        return RunState(
            run_id=value["run_id"],
            tag=value["tag"],
            engine=value["engine"],
            networks={name: Subnet(**subnet) for name, subnet in value["networks"].items()},
            targets={name: Target(**target) for name, target in value["targets"].items()},
        )


class Run:
    """One run's directory and its state. Every read is fresh: several processes share a run."""

    def __init__(self, run_id: str, *, root: Path | None = None) -> None:
        """`root` is where runs live, `lab_root()` by default. Raises LabError for an unusable id."""
        if not _RUN_ID.match(run_id):
            raise LabError(f"Run id {run_id!r}: lower-case letters, digits and dashes, 32 at most.")
        self.id = run_id
        self.directory = (root or lab_root()).absolute() / run_id
        self.tag = hashlib.sha256(os.fsencode(self.directory)).hexdigest()[:8]

    @staticmethod
    def of_hosts_file(path: Path) -> Run:
        """The run whose hosts file this is. Raises LabError when it is no lab's."""
        directory = path.absolute().parent
        if path.name != "hosts.toml" or not (directory / "lab.json").is_file():
            raise LabError(
                f"{path} is not a lab's hosts file.", hint="`make lab-up` starts a lab and names its file."
            )
        return Run(directory.name, root=directory.parent)

    @property
    def file(self) -> Path:
        """lab.json."""
        return self.directory / "lab.json"

    @property
    def hosts_file(self) -> Path:
        """hosts.toml of the run's targets."""
        return self.directory / "hosts.toml"

    @property
    def ssh_config(self) -> Path:
        """OpenSSH configuration that matches the targets' names and addresses."""
        return self.directory / "ssh_config"

    @property
    def keys(self) -> Path:
        """Directory of the run's private keys."""
        return self.directory / "keys"

    @property
    def logs(self) -> Path:
        """Directory of logs."""
        return self.directory / "logs"

    @property
    def exists(self) -> bool:
        """Whether the run has begun and is not down."""
        return self.file.is_file()

    def create(self) -> None:
        """Begin the run: directories (0700) and an empty state. Does nothing when it has begun."""
        for directory in (self.directory, self.keys, self.logs):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self.lock("state"):
            if not self.exists:
                write(self.file, json.dumps(RunState(run_id=self.id, tag=self.tag).to_json(), indent=1))

    def read(self) -> RunState:
        """The state now. Raises LabError when the run has not begun."""
        try:
            return RunState.from_json(json.loads(self.file.read_text()))
        except FileNotFoundError as error:
            raise LabError(f"No lab run {self.id!r}.", hint="`python -m lab up` starts one.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise LabError(f"{self.file} cannot be read: {error}.") from error

    def update(self, change: Callable[[RunState], RunState]) -> RunState:
        """Replace the state by `change(state)`, alone and atomically. Returns the new one."""
        with self.lock("state"):
            state = change(self.read())
            write(self.file, json.dumps(state.to_json(), indent=1))
        return state

    def target(self, name: str) -> Target:
        """The target called `name`. Raises LabError when the run has none."""
        targets = self.read().targets
        if name not in targets:
            raise LabError(
                f"Lab run {self.id!r} has no target {name!r}; it has: {', '.join(targets) or 'none'}."
            )
        return targets[name]

    def save_target(self, target: Target) -> Target:
        """Write a target down, new or changed."""
        self.update(lambda state: replace(state, targets={**state.targets, target.name: target}))
        return target

    def forget_target(self, name: str) -> None:
        """Take a target that is gone off the state."""
        self.update(
            lambda state: replace(state, targets={key: t for key, t in state.targets.items() if key != name})
        )

    def lock(self, name: str = "run") -> contextlib.AbstractContextManager[None]:
        """Hold the run's lock of that name: `run` while targets come and go."""
        return locked(self.directory / f".{name}.lock")

    @property
    def busy(self) -> bool:
        """Whether some process is bringing targets of the run up or down just now."""
        with (self.directory / ".run.lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def remove(self) -> None:
        """Delete the run's directory; the last act of `down`."""
        shutil.rmtree(self.directory, ignore_errors=True)


def current_run_id(environ: Mapping[str, str] | None = None) -> str:
    """QUIETPORT_LAB_RUN, else `default`."""
    return (os.environ if environ is None else environ).get(ENV_RUN) or "default"


def cache_root(environ: Mapping[str, str] | None = None) -> Path:
    """What is built once and shared by runs: QUIETPORT_LAB_CACHE, else the user's cache directory."""
    environ = os.environ if environ is None else environ
    if root := environ.get(ENV_CACHE):
        return Path(root).absolute()
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quietport-lab"


def all_runs(root: Path | None = None) -> list[Run]:
    """The runs that have begun and are not down, by id."""
    root = root or lab_root()
    return [Run(path.parent.name, root=root) for path in sorted(root.glob("*/lab.json"))]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock (flock(2)) on `path`; the kernel lets go of it when we die."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write(path: Path, text: str, *, mode: int = 0o600) -> None:
    """Replace a file at once: a reader sees the old content or the new, never half of it."""
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "w") as file:
            file.write(text)
        Path(name).chmod(mode)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
