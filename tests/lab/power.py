"""A converged VM under a guard, whose machine goes down or whose clock is set (test_power.py asks for it).

Each fault begins with a snapshot of the converged host, arms a guard, changes firewall and sshd, and ends
with the host as it was: all that a guard keeps is compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lab import targets, vm
from lab.process import LabError
from quietport.guard.fence import NOT_ARMED
from tests.lab.onhost import ARMED, CHANGE, CHANGED, OnHost, waited
from tests.lab.story import reachable

TIMEOUT_S = 20
# Of a fault for which the host was too slow: its guard had undone the change before.
TRIES = 3
# Until a rollback is over, or a boot. Emulated on a machine that does much else, all takes its time.
PATIENCE_S, EMULATED_PATIENCE_S = 120, 900
ON_DISK = f"{CHANGE}; sync"
# What is still at work when the power goes.
AT_WORK = "/run/lab-at-work"


class TooSlow(AssertionError):
    """The guard's time was over before the fault came: nothing was shown of it."""


@dataclass(frozen=True)
class Ended:
    """What the host says came of a guard, and what is wrong with that, if anything is."""

    said: str
    failure: str | None = None


@dataclass(frozen=True)
class Power:
    """The VM, and what is done to it while a guard is armed."""

    host: OnHost

    @property
    def emulated(self) -> bool:
        """Whether the VM is, for want of KVM."""
        return self.host.target.detail["driver"] == "qemu"

    @property
    def patience_s(self) -> int:
        """Seconds after the guard's time in which everything must have come to its end."""
        return EMULATED_PATIENCE_S if self.emulated else PATIENCE_S

    def run(self) -> Mapping[str, Ended]:
        """Every fault, one after the other; the host is in the end as it was."""
        self.host.scope()
        targets.snapshot(self.host.lab.run, self.host.target)
        return {name: self._ended(fault) for name, fault in FAULTS.items()}

    def _ended(self, fault: Callable[[Power], str]) -> Ended:
        for left in reversed(range(TRIES)):
            try:
                return Ended(self._tried(fault))
            except TooSlow as error:
                if not left:
                    return Ended("", f"{TRIES} times: {error}")
            except Exception as error:
                return Ended("", f"{type(error).__name__}: {error}\n{self._told()}")
            finally:
                targets.restore(self.host.lab.run, self.host.target)
        raise AssertionError("not reached")

    def _told(self) -> str:
        """What the host wrote of its guard, which goes with the next restore."""
        try:
            return self.host.inside("journalctl --no-pager -o short-monotonic -t quietport-guard -n 40")
        except LabError as error:
            return str(error)

    def _tried(self, fault: Callable[[Power], str]) -> str:
        """Let the fault come; what the host says of its end."""
        host = self.host
        address = host.addresses()[0]
        wanted = fault(self)
        token = host.inside("cat /root/lab-token").strip()
        end = host.end_of(token, within=TIMEOUT_S + self.patience_s)
        host.comes_to_answer(address, within=self.patience_s)
        assert host.differs() == ""
        assert not reachable(host.target, host.places)
        if wanted == "boot" and end["why"] == "timeout":
            raise TooSlow(f"undone before its power went: {end}")
        assert (end["how"], end["why"]) == ("rolled back", wanted), end
        return f"{end['how']} ({end['why']})"

    def _changed(self, exec_: str = f"quietport guard exec $token -- sh -c '{ON_DISK}'") -> None:
        """Arm, keep the token for later, change."""
        arm = f"token=$(quietport guard arm --timeout {TIMEOUT_S} 2>/dev/null)"
        script = f"set -e; {arm}; echo $token >/root/lab-token; sync; {exec_}"
        there = f"test -e {CHANGED}; grep -q 2222 /etc/ufw/user.rules"
        done = self.host.done(f"{script}; {there}")
        if done.returncode == NOT_ARMED or not self.host.armed:
            raise TooSlow(f"undone before all was changed: {done.stderr}")
        assert done.returncode == 0, done.stderr

    def _off_and_on(self) -> None:
        """The power goes, and comes back."""
        run, target = self.host.lab.run, self.host.target
        vm.power_off(run, target)
        targets.start(run, target)

    def rebooted(self) -> str:
        self._changed()
        targets.restart(self.host.lab.run, self.host.target)
        return "boot"

    def power_cut(self) -> str:
        self._changed()
        self._off_and_on()
        return "boot"

    def power_cut_during_a_command(self) -> str:
        long = f"{ON_DISK}; touch {AT_WORK}; sleep 600"
        wait = f"while ! [ -e {AT_WORK} ] && [ -e {ARMED} ]; do sleep 0.1; done"
        self._changed(f"quietport guard exec $token -- sh -c '{long}' >/dev/null 2>&1 & {wait}")
        self._off_and_on()
        return "boot"

    def power_cut_during_the_rollback(self) -> str:
        """The rollback has taken the first file away, and is begun again by the boot."""
        self._changed()
        waited(
            lambda: self.host.done(f"test -e {CHANGED}").returncode != 0,
            "the rollback began",
            within=TIMEOUT_S + self.patience_s,
            every=0.1,
        )
        if not self.host.armed:
            raise TooSlow("undone before its power went")
        self._off_and_on()
        return "boot"

    def clock_set(self, when: str) -> str:
        """A timer by the wall clock would wait an hour more, or be over at once."""
        host = self.host
        try:
            self._changed(f"date --set '{when}'; quietport guard exec $token -- sh -c '{ON_DISK}'")
            wait = TIMEOUT_S + self.patience_s
            waited(lambda: not host.armed, "undone", within=wait, every=0.5)
        finally:
            host.inside(f"date --utc --set @{time.time():.0f}")
        return "timeout"


# By name; each returns why the guard rolls back.
FAULTS: Mapping[str, Callable[[Power], str]] = {
    "rebooted": Power.rebooted,
    "power cut": Power.power_cut,
    "power cut during a command": Power.power_cut_during_a_command,
    "power cut during the rollback": Power.power_cut_during_the_rollback,
    "clock set back an hour": lambda power: power.clock_set("1 hour ago"),
    "clock set forward a day": lambda power: power.clock_set("1 day"),
}
