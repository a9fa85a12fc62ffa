"""Two machines that are none: network and mount namespaces of this one, with sshd in each and a cable between them.

All of it belongs to two sleeping processes and vanishes with them, however the test ends. Nothing of the real machine
is changed: each node sees its own /etc/hosts, /etc/ssh/ssh_config and /run by bind mounts that nobody else sees.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

TOOLS = ("unshare", "nsenter", "setpriv", "ip", "mount", "ssh", "ssh-keygen", "pdsh", "sshd")
NODES = {"node-a": "10.99.0.1", "node-b": "10.99.0.2"}
INTERFACE = "eth0"
DIES_WITH_US = ["setpriv", "--pdeathsig", "KILL"]
SSHD = "/usr/sbin/sshd"


def why_not() -> str | None:
    """What this machine lacks, or None where two nodes can be made."""
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    missing = [name for name in TOOLS if not shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")]
    if missing:
        return f"{', '.join(missing)} not here: apt-get install iproute2 openssh-client openssh-server pdsh util-linux"
    tried = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True, text=True)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


class TwoNodes:
    """Makes the nodes; use it in a ``with`` block.

    Args:
        folder: made for keys and settings; must not be shorter-lived than the nodes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.holders: dict[str, subprocess.Popen[bytes]] = {}
        self.daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> TwoNodes:
        try:
            self._write_settings()
            for name in NODES:
                self.holders[name] = subprocess.Popen(
                    [*DIES_WITH_US, "unshare", "--net", "--mount", "sleep", "infinity"]
                )
            time.sleep(0.5)  # until both have left the namespaces of their parent
            self._lay_the_cable()
            for name in NODES:
                self._furnish(name)
            self._wait_for_ssh()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*self.daemons, *self.holders.values()]:
            process.kill()
            process.wait()

    def on(self, node: str, *command: str) -> list[str]:
        """The command line that runs ``command`` on a node."""
        pid = str(self.holders[node].pid)
        return ["nsenter", "--target", pid, "--net", "--mount", f"--wd={Path.cwd()}", *command]

    def _run(self, *command: str) -> None:
        subprocess.run(command, check=True, capture_output=True, text=True)

    def _write_settings(self) -> None:
        self.folder.mkdir()
        for name in ("host", "user"):
            self._run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / f"{name}_key"))
        shutil.copy(self.folder / "user_key.pub", self.folder / "authorized_keys")
        (self.folder / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in NODES.items())
        )
        (self.folder / "ssh_config").write_text(
            f"Host *\n  IdentityFile {self.folder}/user_key\n  StrictHostKeyChecking no\n"
            f"  UserKnownHostsFile {self.folder}/known_hosts\n  LogLevel ERROR\n"
        )
        (self.folder / "sshd_config").write_text(
            f"HostKey {self.folder}/host_key\nAuthorizedKeysFile {self.folder}/authorized_keys\nStrictModes no\n"
            "UsePAM no\nPidFile none\nPermitRootLogin prohibit-password\nPasswordAuthentication no\nUseDNS no\n"
        )

    def _lay_the_cable(self) -> None:
        first, second = (str(holder.pid) for holder in self.holders.values())
        # Made inside the first node: the machine's own list of interfaces is never touched.
        self._run(
            *("nsenter", "--target", first, "--net", "ip", "link", "add", INTERFACE, "type", "veth"),
            *("peer", "name", INTERFACE, "netns", second),
        )
        for name, address in NODES.items():
            self._run(*self.on(name, "ip", "link", "set", "lo", "up"))
            self._run(*self.on(name, "ip", "address", "add", f"{address}/24", "dev", INTERFACE))
            self._run(*self.on(name, "ip", "link", "set", INTERFACE, "up"))

    def _furnish(self, name: str) -> None:
        for file, place in (("hosts", "/etc/hosts"), ("ssh_config", "/etc/ssh/ssh_config")):
            self._run(*self.on(name, "mount", "--bind", str(self.folder / file), place))
        self._run(*self.on(name, "mount", "-t", "tmpfs", "tmpfs", "/run"))
        self._run(*self.on(name, "mkdir", "-m", "0755", "/run/sshd"))
        log = (self.folder / f"sshd_{name}.txt").open("wb")
        with log:
            daemon = DIES_WITH_US + self.on(name, SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config"))
            self.daemons.append(subprocess.Popen(daemon, stdout=log, stderr=log, stdin=subprocess.DEVNULL))

    def _wait_for_ssh(self) -> None:
        first, deadline = next(iter(NODES)), time.monotonic() + 60
        for name in NODES:
            while subprocess.run(self.on(first, "ssh", name, "true"), capture_output=True).returncode:
                logs = "".join(log.read_text() for log in self.folder.glob("sshd_*.txt"))
                assert time.monotonic() < deadline, f"sshd of {name} does not answer: {logs}"
                time.sleep(0.2)
