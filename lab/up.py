"""Bringing a run up and down: the order in which its parts come, and go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from lab import container, engine, hosts, keys, network, targets
from lab.aptrepo import AptRepo
from lab.engine import Engine
from lab.process import LabError, say, step
from lab.state import Run, Target, cache_root, write
from lab.tailnet import Tailnet
from lab.variants import DETAIL, Around, apply, check, keys_of

CA_FILE = "/usr/local/share/ca-certificates/quietport-lab.crt"


@dataclass(frozen=True)
class Wanted:
    """A target somebody asks for. Without variants it is blank; `name` is the usual one by default."""

    kind: str
    distro: str
    name: str
    variants: tuple[str, ...] = ()

    @staticmethod
    def of(kind: str, distro: str, *, name: str | None = None, variants: Sequence[str] = ()) -> Wanted:
        """Raises LabError when there can be no such target."""
        check(variants, kind=kind, distro=distro)
        usual = targets.name_of(kind, distro)
        if kind == "container":
            usual = "-".join((usual, *variants))
        return Wanted(kind, distro, name or usual, tuple(variants))


def services(run_: Run) -> Around:
    """Bring up what the run's targets need and is not up: service address, tailnet, apt repositories."""
    address = network.ensure_service(run_)
    subnet = network.claim(run_, "service")
    network.allow(run_, subnet)
    tailnet = Tailnet(run_.directory, address, cache_root(), service=subnet)
    tailnet.start()
    repository = AptRepo(run_.directory, cache_root())
    repository.serve(address)
    return Around(tailnet, repository)


def up(run_: Run, wanted: Sequence[Wanted], *, fresh: bool = False) -> list[Target]:
    """Have these targets, with everything around them, and write the run's files.

    One that runs stays as it is, one that is down is started; with `fresh` it is made anew.
    Raises LabError that says what did not come up; what there is stays for `logs` and goes with `down`.
    """
    run_.create()
    with run_.lock(), ThreadPoolExecutor(max_workers=4) as pool:
        # The first time their programs are compiled for minutes; a VM boots meanwhile.
        coming = pool.submit(services, run_)
        there = {want.name: _present(run_, want, fresh=fresh) for want in wanted}
        missing = [want for want in wanted if there[want.name] is None]
        containers = [want for want in missing if want.kind == "container"]
        others = [want for want in missing if want not in containers]
        new = list(pool.map(lambda want: _boot(run_, want), containers))
        new += [_boot(run_, want) for want in others]
        around = coming.result()
        for target in new:
            forget(run_, around.tailnet, target.name)
        # Their scripts install packages and wait; the targets do not wait for each other.
        finished = list(pool.map(lambda target: _finish(run_, around, target), new))
        found = {target.name: target for target in (*there.values(), *finished) if target is not None}
        write_files(run_, around)
    return [found[want.name] for want in wanted]


def _present(run_: Run, want: Wanted, *, fresh: bool) -> Target | None:
    """The target as it is wanted when it is there, running."""
    old = run_.read().targets.get(want.name)
    state = targets.state(run_, old) if old else "gone"
    # Its key to the tailnet is the last thing a target is given: without one it was never finished.
    finished = old is not None and "auth_key" in old.detail
    if old is None or fresh or not finished or state not in ("running", "stopped"):
        return None
    is_it = (old.kind, old.distro, old.detail.get(DETAIL, ""))
    if is_it != (want.kind, want.distro, ",".join(want.variants)):
        raise LabError(
            f"{want.name} is there already, and is another kind of host.",
            hint="`--fresh` makes it anew; `--name` gives this one another name.",
        )
    say(f"  {want.name} is there already; `--fresh` makes it anew")
    return old if state == "running" else targets.start(run_, old)


def _boot(run_: Run, want: Wanted) -> Target:
    target = targets.create(run_, want.kind, want.distro, want.name)
    return run_.save_target(replace(target, detail={**target.detail, DETAIL: ",".join(want.variants)}))


def _finish(run_: Run, around: Around, target: Target) -> Target:
    _trust(run_, target, around.tailnet.ca_cert)
    if variants := target.detail[DETAIL]:
        with step(f"{target.name} becomes {variants}"):
            apply(run_, target, around)
    return new_auth_key(run_, around.tailnet, target)


def forget(run_: Run, tailnet: Tailnet, name: str) -> None:
    """A host of that name begins anew: its nodes, its pinned keys and its remembered addresses go."""
    for node in joined(tailnet, name):
        tailnet.delete_node(node)
    hosts.forget_host_key(run_, name)
    for path in (run_.directory / "operator").glob(f"{name}.*"):
        path.unlink()


def joined(tailnet: Tailnet, name: str) -> list[str]:
    """The names on the tailnet of the nodes that asked to be called `name`."""
    return [node.name for node in tailnet.nodes() if node.hostname == name]


def new_auth_key(run_: Run, tailnet: Tailnet, target: Target) -> Target:
    """Give the target a key to join with that nobody has used."""
    if old := target.detail.get("auth_key"):
        Path(old).unlink(missing_ok=True)
    key = tailnet.auth_key()
    return run_.save_target(replace(target, detail={**target.detail, "auth_key": str(key)}))


def _trust(run_: Run, target: Target, certificate: Path) -> None:
    """Make the target trust the lab's authority: its tailnet stands for one the world trusts.

    As update-ca-certificates(8) leaves it, and the next run of it keeps it. That reads all of the hundred and
    fifty others, too, which takes an emulated machine minutes.
    """
    script = f"""
cat > {CA_FILE} <<'END'
{certificate.read_text().strip()}
END
cd /etc/ssl/certs
ln -sf {CA_FILE} quietport-lab.pem
ln -sf quietport-lab.pem "$(openssl x509 -noout -subject_hash -in {CA_FILE}).0"
cat {CA_FILE} >> ca-certificates.crt
"""
    targets.execute(run_, target, ["sh", "-ec", script])


def write_files(run_: Run, around: Around) -> None:
    """hosts.toml and ssh_config of the targets that are up."""
    repository, tailnet = around.repository, around.tailnet
    found = [target for target in run_.read().targets.values() if target.state != "creating"]
    text = hosts.hosts_toml(
        found,
        services=hosts.Services.of(tailnet, repository),
        identity_file=keys.operator_key(run_),
        auth_keys={t.name: Path(t.detail["auth_key"]) for t in found if "auth_key" in t.detail},
        example_secret=hosts.example_secret(run_),
        more={target.name: keys_of(run_, target) for target in found},
    )
    write(run_.hosts_file, text)
    write_ssh_config(run_, tailnet)


def write_ssh_config(run_: Run, tailnet: Tailnet) -> None:
    """ssh_config, with the tailnet addresses of those that joined by now."""
    addresses = {node.hostname: node.addresses for node in tailnet.nodes() if node.name == node.hostname}
    found = list(run_.read().targets.values())
    users = {target.name: user for target in found if (user := keys_of(run_, target).get("user"))}
    text = hosts.ssh_config(run_, found, tailnet_proxy=tailnet.proxy_command, tailnet=addresses, users=users)
    write(run_.ssh_config, text)


def snapshot(run_: Run, target: Target) -> None:
    """Keep the target as it is, and whether it was on the tailnet."""
    with run_.lock():
        with step(f"snapshot of {target.name}"):
            targets.snapshot(run_, target)
        nodes = joined(Tailnet.attach(run_.directory), target.name)
        run_.save_target(replace(target, detail={**target.detail, "snapshot_joined": "yes" if nodes else ""}))


def restore(run_: Run, target: Target) -> None:
    """Bring the target back to its snapshot. What was not on the tailnet then begins anew there as well."""
    with run_.lock():
        with step(f"restore {target.name}"):
            targets.restore(run_, target)
        target = run_.target(target.name)
        if not target.detail.get("snapshot_joined"):
            around = services(run_)
            forget(run_, around.tailnet, target.name)
            new_auth_key(run_, around.tailnet, target)
            write_files(run_, around)


def down(run_: Run) -> None:
    """Remove what the run made, and nothing else; also what a crash left half made.

    Everything is tried; raises LabError when something is still there, and then the state stays too.
    """
    if not run_.exists:
        say(f"No lab run {run_.id!r}: nothing to remove.")
        return
    failures: list[str] = []

    def part(what: str, act: Callable[[], object]) -> None:
        try:
            act()
        except (LabError, OSError) as error:
            failures.append(f"{what}: {error}")

    with run_.lock():
        state = run_.read()
        # Removing containers takes a daemon: the lab's own is started for that, should it have died.
        docker: list[Engine] = []
        if state.engine is not None:
            part("Docker", lambda: docker.append(engine.acquire(run_)))
        for target in state.targets.values():
            part(target.name, lambda target=target: targets.destroy(run_, target))  # type: ignore[misc]
        if "vm" in state.networks:
            part("virtual machines", lambda: _sweep_vms(run_))
        found = docker[0] if docker else None
        part("containers", lambda: container.sweep(run_, found))
        part("tailnet", lambda: Tailnet(run_.directory, "", cache_root()).stop())
        part("apt repositories", lambda: AptRepo(run_.directory, cache_root()).stop())
        part("networks", lambda: network.release(run_, found))
        if docker:
            part("Docker daemon", lambda: engine.release(run_))
        if not failures:
            run_.remove()
    if failures:
        raise LabError(
            f"Lab run {run_.id!r} is not all gone: {'; '.join(failures)}", hint="Try `down` again."
        )


def _sweep_vms(run_: Run) -> None:
    from lab import vm

    vm.sweep(run_)
