"""The process that ends the agent: at its TTL, when the wrapper asks for it, and when the wrapper dies.

    wrapper -- watch -- keeper (cat) -- ssh-agent

ssh-agent is started with a command (ssh-agent(1)): it ends by itself within 10 seconds of its parent, the
keeper, which lives until the pipe from the watch is closed. So the agent ends also when wrapper and watch are
both killed. The keeper does not wait for children: while it lives, the PID of the agent is the agent's.

The watch is made with fork(2) before anything is done with the key, and has a session of its own: signals
for the command do not reach it. PR_SET_PDEATHSIG would not do: it is cleared for the set-group-ID
ssh-agent of Debian.
"""

from __future__ import annotations

import json
import os
import select
import signal
import stat
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from quietport.sshagent.names import AgentAccessError
from quietport.sshagent.process import Process, adopt_orphans, boottime, end
from quietport.sshagent.spawn import close_above, environment, spawn

START_S = 60.0
# From the polite to the certain end of an agent.
GRACE_S = 2.0
ASKED, TTL_OVER, AGENT_DIED, NO_AGENT = 0, 10, 11, 12
_SCRIPT = 'echo "$SSH_AGENT_PID"; exec cat >/dev/null 2>&1'
_LONGEST_WAIT_S = 60.0


@dataclass
class Watch:
    """The watch as its wrapper has it. `exit_code` is None while it runs, negative for a signal."""

    pid: int
    life: int
    report: int
    agent: Process | None = None
    keeper: Process | None = None
    exit_code: int | None = None
    _agent_fd: int = field(default=-1)

    def started(self, line: bytes) -> None:
        """Take the watch's report. Raises AgentAccessError when there is no agent."""
        try:
            report: dict[str, Any] = json.loads(line)
        except ValueError:
            report = {"error": "it ended before it said anything"}
        if "error" in report:
            raise AgentAccessError(f"ssh-agent cannot be started: {report['error']}.")
        self.agent, self.keeper = Process(**report["agent"]), Process(**report["keeper"])
        with suppress(OSError):
            self._agent_fd = os.pidfd_open(self.agent.pid)

    def stop(self) -> None:
        """End the agent and the watch, and wait for both. Can be called again."""
        if self.life >= 0:
            os.close(self.life)
            self.life = -1
        if self.exit_code is None:
            self.exit_code = _wait(self.pid, GRACE_S * 3)
        if self._agent_fd >= 0:
            # Already gone unless the watch was killed.
            with suppress(OSError):
                signal.pidfd_send_signal(self._agent_fd, signal.SIGKILL)
            os.close(self._agent_fd)
            self._agent_fd = -1


def start(*, ssh_agent: str, name: str, sockets: int, ttl_s: int, deadline: float) -> Watch:
    """Start a watch, which starts an agent with the socket `name` in the directory `sockets`.

    `deadline` is in seconds since boot. What came of it can be read, as a line, from the `report` of the
    result. Raises AgentAccessError.
    """
    try:
        life_r, life_w = os.pipe()
        report_r, report_w = os.pipe()
        wrapper = os.getpid()
        child = os.fork()
    except OSError as error:
        raise AgentAccessError(f"No process can be made: {error.strerror}.") from error
    if child == 0:
        _main(
            _Duty(ssh_agent, name, sockets, ttl_s, deadline, life_r, report_w, wrapper),
        )
    os.close(life_r)
    os.close(report_w)
    return Watch(child, life_w, report_r)


@dataclass(frozen=True)
class _Duty:
    ssh_agent: str
    name: str
    sockets: int
    ttl_s: int
    deadline: float
    life: int
    report: int
    wrapper: int


def _main(duty: _Duty) -> NoReturn:
    code = NO_AGENT
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        close_above(2, keep=(duty.sockets, duty.life, duty.report))
        adopt_orphans()
        code = _guard(duty)
    except BaseException as error:  # a child never returns into the code of its parent
        _tell(duty, {"error": f"{type(error).__name__} in its watch"})
    finally:
        os._exit(code)


def _guard(duty: _Duty) -> int:
    hold_r, hold_w = os.pipe()
    said_r, said_w = os.pipe()
    argv = [duty.ssh_agent, "-t", str(duty.ttl_s), "-a", duty.name, "/bin/sh", "-c", _SCRIPT]
    child = spawn(argv, env=environment(), directory=duty.sockets, stdin=hold_r, output=said_w)
    os.close(hold_r)
    os.close(said_w)
    pid = _agent_pid(duty, said_r)
    if pid is None:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.close(hold_w)
        _end_orphans()
        _unlink(duty)
        return NO_AGENT
    agent = os.pidfd_open(pid)
    _tell(duty, {"agent": asdict(Process.of(pid)), "keeper": asdict(Process.of(child))})
    code = _until_it_is_over(duty, agent)
    end(agent, grace_s=GRACE_S)
    # The keeper's orphan comes to us; waiting for it here takes it out of the process table.
    os.close(hold_w)
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.002)
        except ChildProcessError:
            break
    _unlink(duty)
    return code


def _agent_pid(duty: _Duty, said: int) -> int | None:
    """The PID that the keeper prints; None, and told to the wrapper, when it prints something else."""
    text = b""
    poll = select.poll()
    poll.register(said, select.POLLIN)
    poll.register(duty.life, select.POLLIN)
    deadline = time.monotonic() + START_S
    while b"\n" not in text and (left := deadline - time.monotonic()) > 0:
        ready = dict(poll.poll(left * 1000))
        if duty.life in ready:
            return None
        if said in ready:
            part = os.read(said, 4096)
            if not part:
                break
            text += part
    line = text.decode(errors="replace").strip().splitlines()
    if line and line[0].isascii() and line[0].isdecimal() and int(line[0]) > 1:
        return int(line[0])
    _tell(duty, {"error": line[-1][:200].rstrip(".") if line else "it says nothing"})
    return None


def _until_it_is_over(duty: _Duty, agent: int) -> int:
    poll = select.poll()
    poll.register(duty.life, select.POLLIN)
    poll.register(agent, select.POLLIN)
    while True:
        left = duty.deadline - boottime()
        if left <= 0:
            return TTL_OVER
        # Not in one go: poll(2) does not count the time of a suspended machine.
        ready = dict(poll.poll(min(left, _LONGEST_WAIT_S) * 1000))
        if duty.life in ready:
            return ASKED
        if agent in ready:
            return AGENT_DIED


def _end_orphans() -> None:
    """End what a start that came to nothing left to us: nothing else is below this process."""
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline:
        with suppress(OSError, ValueError):
            me = os.getpid()
            for pid in Path(f"/proc/{me}/task/{me}/children").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.002)
        except ChildProcessError:
            return


def _unlink(duty: _Duty) -> None:
    # ssh-agent has gone to / by then and does not find its socket by its relative name.
    with suppress(OSError):
        mode = os.stat(duty.name, dir_fd=duty.sockets, follow_symlinks=False).st_mode
        if stat.S_ISSOCK(mode):
            os.unlink(duty.name, dir_fd=duty.sockets)


def _tell(duty: _Duty, report: dict[str, Any]) -> None:
    with suppress(OSError):
        os.write(duty.report, json.dumps(report).encode() + b"\n")


def _wait(pid: int, seconds: float) -> int:
    """The exit code of the child `pid`, negative for a signal; it is killed after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            done, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return ASKED
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            os.kill(pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.001)
