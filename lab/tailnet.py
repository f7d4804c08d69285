"""A tailnet of the lab's own: headscale with an embedded relay, and a control node that is on it.

headscale listens on one address, that of the run's service bridge. The control node is tailscaled in
userspace mode: it needs no tun device and touches no route or rule of this machine. Both outlive the
process that started them; `Tailnet.attach` finds them again.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shlex
import shutil
import ssl
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lab import ca, toolchain
from lab.process import LabError, Process, alive, identify, run, spawn, step, stop, succeeds, wait_until
from lab.state import Subnet, locked, write

SCHEMA = 1
USER = "ops"
CONTROL_NAME = "qpl-control"
NAMESPACE_PREFIX = "qpn"
SERVER_NAME = "headscale.lab.internal"
PORT = 8443
STUN_PORT = 3478
GRPC_PORT = 50443
# Tags that a node may ask for itself: headscale refuses any tag without an owner.
TAGS = ("tag:lab", "tag:server")
# sun_path of unix(7) is 108 bytes with its closing zero; room is left for the longest name below.
MAX_SOCKET_DIRECTORY = 90
COMMAND_TIMEOUT_S = 60
JOIN_TIMEOUT_S = 60


@dataclass(frozen=True)
class Node:
    """A machine on the tailnet, as headscale knows it."""

    id: int
    name: str
    """Its name on the tailnet: a second `vps1` is `vps1-` and a suffix here."""
    hostname: str
    """The name it asked for."""
    addresses: tuple[str, ...]
    online: bool
    tags: tuple[str, ...]
    expiry: datetime.datetime | None


@dataclass(frozen=True)
class Record:
    """The content of tailnet.json: what another process needs to find this tailnet again."""

    address: str
    cache: str
    sockets: str
    service: Subnet | None = None
    headscale: Process | None = None
    control: Process | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "schema": SCHEMA,
            "address": self.address,
            "cache": self.cache,
            "sockets": self.sockets,
            "service": self.service and asdict(self.service),
            "headscale": self.headscale and self.headscale.to_json(),
            "control": self.control and self.control.to_json(),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Record:
        """What `to_json` wrote. Raises LabError for another schema."""
        if value.get("schema") != SCHEMA:
            raise LabError(f"tailnet.json has schema {value.get('schema')!r}, this lab reads {SCHEMA}.")
        return Record(
            address=value["address"],
            cache=value["cache"],
            sockets=value["sockets"],
            service=Subnet(**value["service"]) if value.get("service") else None,
            headscale=value["headscale"] and Process.from_json(value["headscale"]),
            control=value["control"] and Process.from_json(value["control"]),
        )


def headscale_config(*, directory: Path, sockets: Path, address: str) -> str:
    """headscale's configuration, in JSON (which is YAML): it listens on `address` and nowhere else.

    No DNS is handed out, so that targets keep their own; nothing is asked of the Internet (no relay map,
    no check for updates).
    """
    config: dict[str, Any] = {
        "server_url": login_server(address),
        "listen_addr": f"{address}:{PORT}",
        "metrics_listen_addr": "",
        # headscale opens this one whenever it has a certificate; its own CLI uses the unix socket.
        "grpc_listen_addr": f"{address}:{GRPC_PORT}",
        "noise": {"private_key_path": str(directory / "noise.key")},
        "prefixes": {"v4": "100.64.0.0/10", "v6": "fd7a:115c:a1e0::/48", "allocation": "sequential"},
        "derp": {
            "server": {
                "enabled": True,
                "region_id": 999,
                "region_code": "lab",
                "region_name": "lab",
                "verify_clients": True,
                "stun_listen_addr": f"{address}:{STUN_PORT}",
                "private_key_path": str(directory / "derp.key"),
                "automatically_add_embedded_derp_region": True,
                "ipv4": address,
                # Not an address means no IPv6 (tailcfg.DERPNode): a node would wait for an answer to it.
                "ipv6": "none",
            },
            "urls": [],
            "paths": [],
            "auto_update_enabled": False,
        },
        "disable_check_updates": True,
        "node": {"expiry": 0, "ephemeral": {"inactivity_timeout": "2m"}},
        "database": {"type": "sqlite", "sqlite": {"path": str(directory / "db.sqlite")}},
        "tls_cert_path": str(directory / "server.crt"),
        "tls_key_path": str(directory / "server.key"),
        "log": {"level": "info", "format": "text"},
        "policy": {"mode": "file", "path": str(directory / "policy.json")},
        # A base domain alone is enough for nodes to write a resolv.conf with it and without nameservers.
        "dns": {"magic_dns": False, "override_local_dns": False, "base_domain": ""},
        "unix_socket": str(sockets / "headscale.sock"),
        "unix_socket_permission": "0700",
        "logtail": {"enabled": False},
    }
    return json.dumps(config, indent=1) + "\n"


def policy() -> str:
    """Everyone on the lab's tailnet may reach everyone; the user owns the lab's tags."""
    rules = {
        "acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}],
        "tagOwners": {tag: [f"{USER}@"] for tag in TAGS},
    }
    return json.dumps(rules, indent=1) + "\n"


def login_server(address: str) -> str:
    """URL that nodes log in at."""
    return f"https://{address}:{PORT}"


def proxy_command(tailscale: Path, socket: Path) -> str:
    """OpenSSH ProxyCommand (%h and %p are filled in by it) that carries SSH into the tailnet."""
    words = shlex.join([str(tailscale), f"--socket={socket}", "nc"])
    # ssh_config(5): %% is a literal %.
    return words.replace("%", "%%") + " %h %p"


def parse_nodes(text: str) -> list[Node]:
    """Nodes from `headscale nodes list --output json`. Raises LabError when it is not that."""
    try:
        return [_node(item) for item in json.loads(text) or []]
    except (ValueError, KeyError, TypeError) as error:
        raise LabError(f"headscale's list of nodes cannot be read: {error!r}.") from error


def _node(item: Mapping[str, Any]) -> Node:
    return Node(
        id=int(item["id"]),
        name=item["given_name"],
        hostname=item["name"],
        addresses=tuple(item["ip_addresses"]),
        online=bool(item.get("online", False)),
        tags=tuple(item.get("tags") or ()),
        expiry=_expiry(item.get("expiry")),
    )


def _expiry(value: Any) -> datetime.datetime | None:
    """Protobuf's JSON is seconds and nanoseconds, or a text; Go's zero time (year 1) means never."""
    if isinstance(value, str):
        moment = datetime.datetime.fromisoformat(value)
    elif isinstance(value, dict):
        seconds = int(value.get("seconds", 0))
        if seconds <= 0:
            return None
        moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    else:
        return None
    return None if moment.year <= 1 else moment


def socket_directory(directory: Path) -> Path:
    """Where the unix sockets go: `directory` itself, or a short private one when its path is too long."""
    if len(os.fsencode(directory)) <= MAX_SOCKET_DIRECTORY:
        return directory
    return Path(tempfile.mkdtemp(prefix="qpl-"))


def namespace_name(service: Subnet) -> str:
    """The network namespace of the control node on a run's service bridge."""
    return f"{NAMESPACE_PREFIX}-{service.bridge.partition('-')[2]}"


def ensure_namespace(service: Subnet) -> str:
    """Make the control node's namespace, with one leg on the bridge, or make it whole. Returns its name."""
    name = namespace_name(service)
    if not (Path("/run/netns") / name).exists():
        run(["ip", "netns", "add", name])
    inside = ["ip", "-netns", name]
    if not succeeds([*inside, "link", "show", "dev", "eth0"]):
        # The leg has the namespace's name, 12 of the 15 characters an interface's name may have.
        run(["ip", "link", "delete", name], check=False)
        run(["ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name])
    run(["ip", "link", "set", name, "master", service.bridge, "up"])
    for device in ("lo", "eth0"):
        run([*inside, "link", "set", device, "up"])
    run([*inside, "address", "replace", f"{service.host4(2)}/24", "dev", "eth0"])
    run([*inside, "-6", "address", "replace", f"{service.host6(2)}/64", "dev", "eth0", "nodad"])
    run([*inside, "route", "replace", "default", "via", service.host4(1)])
    run([*inside, "-6", "route", "replace", "default", "via", service.host6(1)])
    return name


def remove_namespace(service: Subnet) -> None:
    """Take the control node's namespace away; its cable goes with it."""
    name = namespace_name(service)
    if (Path("/run/netns") / name).exists():
        run(["ip", "netns", "delete", name])
    run(["ip", "link", "delete", name], check=False)


class Tailnet:
    """The tailnet of one run. Every method may be called from any process that has attached to it."""

    def __init__(self, run_dir: Path, address: str, cache: Path, *, service: Subnet | None = None) -> None:
        """`address` is the IPv4 address to listen on; `cache` is where built tools are kept.

        `service` is the subnet whose bridge has that address. With it the control node lives in a network
        namespace on that bridge, as host 2: tailscaled cannot be told which addresses to listen on, and
        without a namespace it has a TCP and a UDP port open on all of this machine's. Its unix socket works
        from outside just the same. Making the namespace takes root.
        """
        self.run_dir = run_dir
        self.address = address
        self.cache = cache
        self.service = service
        self.directory = run_dir / "tailnet"
        self.logs = run_dir / "logs"

    @staticmethod
    def attach(run_dir: Path) -> Tailnet:
        """The tailnet that some process started for this run. Raises LabError when there is none."""
        record = _read(run_dir / "tailnet")
        if record is None:
            raise LabError(f"No tailnet was started in {run_dir}.", hint="`python -m lab up` starts one.")
        return Tailnet(run_dir, record.address, Path(record.cache), service=record.service)

    @property
    def login_server(self) -> str:
        """URL that nodes log in at."""
        return login_server(self.address)

    @property
    def ca_cert(self) -> Path:
        """Certificate of the lab's authority, PEM: targets must trust it."""
        return self.directory / "ca.crt"

    @property
    def proxy_command(self) -> str:
        """ProxyCommand that carries SSH to a tailnet address, through the control node."""
        return proxy_command(self._tools.tailscale, self._control_socket)

    @property
    def running(self) -> bool:
        """Whether headscale and the control node are both alive."""
        record = _read(self.directory)
        return record is not None and all(
            process is not None and alive(process) for process in (record.headscale, record.control)
        )

    def start(self) -> None:
        """Bring up what is not up: headscale, its user, the control node on the tailnet.

        Raises LabError that says which of them did not come.
        """
        tools = self._tools
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(self.directory / ".lock"):
            record = self._prepare()
            if record.headscale is None or not alive(record.headscale):
                with step(f"headscale at {self.login_server}"):
                    record = self._start_headscale(tools, record)
            self._ensure_user()
            if record.service is not None:
                ensure_namespace(record.service)
            if record.control is None or not alive(record.control):
                with step("control node on the tailnet"):
                    self._start_control(tools, record)
            self._join_control(tools)

    def stop(self) -> None:
        """End both daemons and remove what they keep. Does nothing when there is nothing.

        A record that cannot be read is no reason to leave them running: they are known by their paths.
        """
        if not self.directory.is_dir():
            return
        with locked(self.directory / ".lock"):
            record = None
            with contextlib.suppress(LabError):
                record = _read(self.directory)
            recorded = [record.control, record.headscale] if record else []
            for process in [*filter(None, recorded), *self._unrecorded()]:
                stop(process)
            if service := record.service if record else self.service:
                remove_namespace(service)
            if record and Path(record.sockets) != self.directory:
                shutil.rmtree(record.sockets, ignore_errors=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def server(self) -> int:
        """Process id of headscale. Raises LabError when it does not run."""
        process = self._record.headscale
        if process is None or not alive(process):
            raise LabError(f"headscale does not run in {self.run_dir}.")
        return process.pid

    def stop_server(self) -> None:
        """End headscale alone, with what it keeps on disk: `start` brings it back."""
        with locked(self.directory / ".lock"):
            if process := self._record.headscale:
                stop(process)

    def auth_key(
        self,
        reusable: bool = False,
        ephemeral: bool = False,
        expiry: str = "24h",
        tags: Sequence[str] = (),
        *,
        expired: bool = False,
    ) -> Path:
        """A new key to join with, in a new 0600 file of the run.

        `expiry` is how long it is good for ("30m", "24h"); `expired` makes it useless at once; `tags` are
        given to every node that joins with it.
        """
        command = ["preauthkeys", "create", "--user", str(self._user_id()), "--expiration", expiry]
        command += [*(["--reusable"] if reusable else []), *(["--ephemeral"] if ephemeral else [])]
        if tags:
            command += ["--tags", ",".join(tags)]
        made = json.loads(self._headscale(*command))
        if expired:
            self._headscale("preauthkeys", "expire", "--id", str(made["id"]))
        keys = self.run_dir / "keys"
        keys.mkdir(mode=0o700, parents=True, exist_ok=True)
        # mkstemp: 0600 from its first byte, and a name nobody else has.
        fd, name = tempfile.mkstemp(dir=keys, prefix="tailnet-", suffix=".key")
        with os.fdopen(fd, "w") as file:
            file.write(made["key"] + "\n")
        return Path(name)

    def nodes(self) -> list[Node]:
        """The machines that ever joined and were not deleted, the control node among them."""
        return parse_nodes(self._headscale("nodes", "list"))

    def node(self, name: str) -> Node:
        """The node that has `name` on the tailnet. Raises LabError when none has."""
        nodes = self.nodes()
        for node in nodes:
            if node.name == name:
                return node
        raise LabError(f"No node {name!r} on the tailnet; there are: {', '.join(n.name for n in nodes)}.")

    def delete_node(self, name: str) -> None:
        """Take a node off the tailnet for good. Raises LabError when there is none of that name."""
        self._headscale("nodes", "delete", "--identifier", str(self.node(name).id), "--force")

    def expire_node(self, name: str, *, at: datetime.datetime | None = None) -> None:
        """Let a node's key expire at that moment, or now. Raises LabError when there is no such node."""
        command = ["nodes", "expire", "--identifier", str(self.node(name).id)]
        if at is not None:
            command += ["--expiry", at.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")]
        self._headscale(*command)

    def never_expire_node(self, name: str) -> None:
        """Undo `expire_node`. Raises LabError when there is no such node."""
        self._headscale("nodes", "expire", "--identifier", str(self.node(name).id), "--disable")

    def tailscale(self, *arguments: str, check: bool = True, timeout: float = COMMAND_TIMEOUT_S) -> str:
        """What the tailscale CLI prints about the control node. Raises LabError when it fails."""
        command = [str(self._tools.tailscale), f"--socket={self._control_socket}", *arguments]
        return run(command, check=check, timeout=timeout).stdout

    @property
    def _tools(self) -> toolchain.Tools:
        return toolchain.build(self.cache)

    @property
    def _record(self) -> Record:
        record = _read(self.directory)
        if record is None:
            raise LabError(f"No tailnet runs in {self.run_dir}.", hint="`python -m lab up` starts one.")
        return record

    @property
    def _control_socket(self) -> Path:
        return Path(self._record.sockets) / "control.sock"

    @property
    def _config(self) -> Path:
        return self.directory / "headscale.yaml"

    @property
    def _serve_arguments(self) -> list[str]:
        return ["serve", f"--config={self._config}"]

    @property
    def _control_directory(self) -> Path:
        return self.directory / "control"

    def _prepare(self) -> Record:
        """Files that both daemons need, and the record. What an earlier start left is kept."""
        record = _read(self.directory)
        if record is None:
            sockets = socket_directory(self.directory)
            record = Record(
                address=self.address, cache=str(self.cache), sockets=str(sockets), service=self.service
            )
            self._save(record)
        if record.address != self.address:
            raise LabError(f"The tailnet in {self.run_dir} is at {record.address}, not {self.address}.")
        authority = ca.authority(self.directory, f"quietport lab {self.run_dir.name}")
        if not (self.directory / "server.crt").is_file():
            ca.server_certificate(authority, self.directory, names=[SERVER_NAME], addresses=[self.address])
        write(self.directory / "policy.json", policy())
        sockets = Path(record.sockets)
        # A short directory under /tmp does not outlive a reboot.
        sockets.mkdir(mode=0o700, exist_ok=True)
        write(self._config, headscale_config(directory=self.directory, sockets=sockets, address=self.address))
        return record

    def _save(self, record: Record) -> None:
        write(self.directory / "tailnet.json", json.dumps(record.to_json(), indent=1) + "\n")

    def _start_headscale(self, tools: toolchain.Tools, record: Record) -> Record:
        log = self.logs / "headscale.log"
        process = spawn([tools.headscale, *self._serve_arguments], log=log)
        record = replace(record, headscale=process)
        self._save(record)
        self._wait_for(process, self._healthy, what=f"headscale answers at {self.login_server}", log=log)
        return record

    def _start_control(self, tools: toolchain.Tools, record: Record) -> None:
        log = self.logs / "control-node.log"
        # `ip` becomes tailscaled: the process id stays the same.
        inside = ["ip", "netns", "exec", namespace_name(record.service)] if record.service else []
        command = [
            *inside,
            str(tools.tailscaled),
            "--tun=userspace-networking",
            f"--statedir={self._control_directory}",
            f"--socket={self._control_socket}",
            "--port=0",
            "--no-logs-no-support",
        ]
        # The node asks this machine's router for nothing, and trusts the lab's authority alone.
        environment = {"SSL_CERT_FILE": str(self.ca_cert), "TS_DISABLE_PORTMAPPER": "1"}
        process = spawn(command, log=log, env=environment)
        self._save(replace(record, control=process))
        self._wait_for(
            process, lambda: self._state() != "", what="the control node's tailscaled answers", log=log
        )

    def _join_control(self, tools: toolchain.Tools) -> None:
        """Log the control node in, unless it is: one that was up before comes back by itself."""
        with contextlib.suppress(LabError):
            wait_until(
                lambda: self._state() not in ("", "NoState", "Starting"), timeout=10, what="a known state"
            )
        if self._state() == "NeedsLogin":
            key = self.auth_key()
            try:
                self.tailscale(
                    "up",
                    f"--login-server={self.login_server}",
                    f"--auth-key=file:{key}",
                    f"--hostname={CONTROL_NAME}",
                    "--accept-dns=false",
                    "--accept-routes=false",
                    f"--timeout={JOIN_TIMEOUT_S}s",
                    timeout=JOIN_TIMEOUT_S + 15,
                )
            finally:
                key.unlink(missing_ok=True)
        log = self.logs / "control-node.log"
        wait_until(
            lambda: self._state() == "Running",
            timeout=JOIN_TIMEOUT_S,
            what="the control node is on the tailnet",
            hint=f"Its log: {log}",
        )

    def _state(self) -> str:
        """BackendState of the control node, or nothing while it does not answer."""
        text = self.tailscale("status", "--json", "--peers=false", check=False)
        try:
            return str(json.loads(text)["BackendState"])
        except (ValueError, KeyError, TypeError):
            return ""

    def _healthy(self) -> bool:
        context = ssl.create_default_context(cafile=str(self.ca_cert))
        # No proxy: a machine with one configured would ask it for the lab's private address.
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        try:
            with opener.open(f"{self.login_server}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _wait_for(self, process: Process, probe: Callable[[], bool], *, what: str, log: Path) -> None:
        """Wait for `probe`, but no longer than its process lives."""

        def answered() -> bool:
            if not alive(process):
                lines = log.read_text(errors="replace").strip().splitlines()[-8:]
                said = "\n".join(lines)
                raise LabError(f"It ended before {what}: {said}", hint=f"Its log: {log}")
            return probe()

        wait_until(answered, timeout=30, what=what, hint=f"Its log: {log}")

    def _headscale(self, *arguments: str) -> str:
        """What the headscale CLI prints, as JSON. It prints keys: no log is kept."""
        command = [str(self._tools.headscale), f"--config={self._config}", "--output=json", *arguments]
        return run(command, timeout=COMMAND_TIMEOUT_S).stdout

    def _user_id(self) -> int:
        for user in json.loads(self._headscale("users", "list")) or []:
            if user["name"] == USER:
                return int(user["id"])
        raise LabError(f"headscale has no user {USER!r}.", hint="`python -m lab down`, then `up`.")

    def _ensure_user(self) -> None:
        users = json.loads(self._headscale("users", "list")) or []
        if USER not in [user["name"] for user in users]:
            self._headscale("users", "create", USER)

    def _unrecorded(self) -> list[Process]:
        """Daemons of this tailnet that a killed `start` had no time to write down, by their own paths."""
        # The order of headscale's arguments tells the server from a command that is just running.
        ours = ["\0".join(self._serve_arguments), f"--statedir={self._control_directory}"]
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, LabError):
                command = os.fsdecode((entry / "cmdline").read_bytes())
                if any(f"\0{words}\0" in command for words in ours):
                    found.append(identify(int(entry.name)))
        return found


def _read(directory: Path) -> Record | None:
    try:
        return Record.from_json(json.loads((directory / "tailnet.json").read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise LabError(f"{directory / 'tailnet.json'} cannot be read: {error!r}.") from error
