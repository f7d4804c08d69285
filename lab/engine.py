"""The Docker daemon that container targets run on: the machine's own when it answers, else the lab's.

The lab's daemon has its own data, socket and state, makes no bridge, no firewall rule and no sysctl of
its own (`lab.network` does that, per run, marked), is shared by runs and ends with the last of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from lab.process import LabError, Process, alive, run, spawn, step, stop, succeeds, wait_until
from lab.state import Run, cache_root, locked, write

MACHINE = "default"
"""Name in lab.json of the daemon that was there already."""
LABEL = "org.quietport.run"
"""Label of everything a run makes in Docker; its value is the run's tag."""


@dataclass(frozen=True)
class Engine:
    """A Docker daemon that answers."""

    socket: str
    """unix://..., or `default` for the machine's own."""

    def argv(self, *arguments: str | os.PathLike[str]) -> list[str]:
        """The command line that asks this daemon."""
        host = [] if self.socket == MACHINE else ["--host", self.socket]
        return ["docker", *host, *[os.fspath(argument) for argument in arguments]]

    def docker(
        self,
        *arguments: str | os.PathLike[str],
        check: bool = True,
        input: str | None = None,
        timeout: float | None = 300,
    ) -> subprocess.CompletedProcess[str]:
        """Run a docker command; `timeout` in seconds. Raises LabError when it fails and `check` is set."""
        return run(self.argv(*arguments), check=check, input=input, timeout=timeout)


@dataclass(frozen=True)
class _Own:
    """Where the lab's own daemon keeps its things."""

    cache: Path

    @property
    def home(self) -> Path:
        return self.cache / "engine"

    @property
    def runtime(self) -> Path:
        # Short: containerd's socket paths below it must fit into 108 bytes (unix(7)).
        return Path("/run/quietport-lab") / hashlib.sha256(os.fsencode(self.cache)).hexdigest()[:8]

    @property
    def socket(self) -> str:
        return f"unix://{self.runtime}/docker.sock"

    @property
    def pid(self) -> Path:
        return self.home / "process.json"

    @property
    def users(self) -> Path:
        return self.home / "users"

    def process(self) -> Process | None:
        """The daemon, when it runs."""
        try:
            process = Process.from_json(json.loads(self.pid.read_text()))
        except (OSError, ValueError, KeyError):
            return None
        return process if alive(process) else None


def acquire(run_: Run) -> Engine:
    """The run's daemon, chosen the first time and started where it is ours and does not run.

    Raises LabError when none can be had.
    """
    chosen = run_.read().engine
    own = _Own(cache_root())
    if chosen is None:
        chosen = MACHINE if succeeds(["docker", "version"], timeout=20) else own.socket
        run_.update(lambda state: replace(state, engine=chosen))
    engine = Engine(chosen)
    if chosen == MACHINE:
        if not succeeds(engine.argv("version"), timeout=20):
            raise LabError(
                f"The Docker daemon that run {run_.id!r} uses no longer answers.", hint="Start it again."
            )
        return engine
    with locked(own.home / "lock"):
        own.users.mkdir(parents=True, exist_ok=True)
        write(own.users / run_.tag, str(run_.directory))
        if own.process() is None or not succeeds(engine.argv("version"), timeout=20):
            _start(own, engine)
    return engine


def attached(run_: Run) -> Engine | None:
    """The run's daemon when it answers, without starting anything."""
    chosen = run_.read().engine
    if chosen is None:
        return None
    engine = Engine(chosen)
    return engine if succeeds(engine.argv("version"), timeout=20) else None


def release(run_: Run) -> None:
    """The run no longer needs its daemon: the lab's own ends when no other run uses it."""
    own = _Own(cache_root())
    if run_.read().engine != own.socket:
        return
    with locked(own.home / "lock"):
        (own.users / run_.tag).unlink(missing_ok=True)
        for user in list(own.users.glob("*")):
            # A run whose directory is gone was not ended by `down`, and can use nothing any more.
            if not (Path(user.read_text()) / "lab.json").is_file():
                user.unlink()
        process = own.process()
        if process and not any(own.users.iterdir()):
            with step("stop the lab's Docker daemon"):
                stop(process, timeout=60)
            own.pid.unlink(missing_ok=True)
            _tidy(own)


def _start(own: _Own, engine: Engine) -> None:
    if os.geteuid() != 0:
        raise LabError("No Docker daemon answers, and only root can start the lab's.", hint="Start Docker.")
    if (process := own.process()) is not None:
        stop(process, timeout=60)
    own.runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
    log = own.home / "dockerd.log"
    argv = [
        "dockerd",
        f"--host={own.socket}",
        f"--data-root={own.home / 'data'}",
        f"--exec-root={own.runtime / 'exec'}",
        f"--pidfile={own.runtime / 'docker.pid'}",
        # Networks are the run's business (lab.network): what Docker would change here it never puts back.
        "--bridge=none",
        "--iptables=false",
        "--ip6tables=false",
        "--ip-forward=false",
        "--ip-masq=false",
        "--userland-proxy=false",
        "--group=root",
        "--log-level=warn",
    ]
    with step("start the lab's Docker daemon"):
        process = spawn(argv, log=log)
        write(own.pid, json.dumps(process.to_json()))
        wait_until(
            lambda: succeeds(engine.argv("version"), timeout=20) or not alive(process),
            timeout=60,
            what="the lab's Docker daemon answers",
            hint=f"Its log: {log}",
        )
        if not alive(process):
            raise LabError("The lab's Docker daemon ended at once.", hint=f"Its log: {log}")


def _tidy(own: _Own) -> None:
    """Take away the empty control groups that dockerd leaves behind, and its runtime directory."""
    for group in [Path("/sys/fs/cgroup/docker"), *Path("/sys/fs/cgroup").glob("*/docker")]:
        try:
            group.rmdir()
        except OSError:
            continue
    if not any(own.runtime.rglob("*.sock")):
        run(["rm", "-rf", "--one-file-system", own.runtime], check=False)
