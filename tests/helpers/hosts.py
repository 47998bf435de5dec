"""Several hosts on one machine: network namespaces with a name and an address each, on one bridge (Linux, root).

Every namespace belongs to a process that ends with this one, so nothing is left behind, however the tests end.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.helpers.launched_runs import LaunchedRun

TOOLS = ("hostname", "ip", "iptables", "nsenter", "tc", "unshare")
DEVICE = "eth0"


class Namespace:
    """A network namespace and a host name. pid: of the process that keeps them."""

    def __init__(self, name: str) -> None:
        # cat ends at the end of its input, which comes when this process ends, also by SIGKILL.
        keep = ["unshare", "--net", "--uts", "sh", "-c", f"hostname {name} && echo ready && exec cat"]
        self._keeper = subprocess.Popen(
            keep, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.name, self.pid = name, self._keeper.pid
        assert self._keeper.stdout
        if self._keeper.stdout.readline() != "ready\n":
            raise PermissionError(self._keeper.communicate()[1].strip())

    def run(self, command: str) -> str:
        """Run one command within it, which must succeed; returns its output."""
        enter = ["nsenter", "--target", str(self.pid), "--net", "--uts", "--", *command.split()]
        result = subprocess.run(enter, capture_output=True, text=True)
        if result.returncode:
            raise PermissionError(f"{command}: {result.stderr.strip()}")
        return result.stdout

    def close(self) -> None:
        self._keeper.communicate()


class Host(Namespace):
    """One host, with its own name and address, whose link can be cut."""

    def __init__(self, number: int, switch: Namespace) -> None:
        super().__init__(f"host-{number}")
        self.address = f"10.77.0.{number + 1}"
        self.run(f"ip link add name {DEVICE} type veth peer name port{number} netns {switch.pid}")
        for command in ("link set lo up", f"address add {self.address}/24 dev {DEVICE}", f"link set {DEVICE} up"):
            self.run(f"ip {command}")
        switch.run(f"ip link set port{number} master switch up")
        self._runs: list[LaunchedRun] = []

    def launch(self, *arguments: str) -> LaunchedRun:
        """Start a launcher on this host. gloo is told the network device, as on hosts whose names do not resolve."""
        run = LaunchedRun(*arguments, namespaces_of=self.pid, GLOO_SOCKET_IFNAME=DEVICE)
        self._runs.append(run)
        return run

    def fail(self) -> None:
        """Lose the power: nobody hears of it, for the link goes first."""
        self.run(f"ip link set {DEVICE} down")
        self.kill_all()

    def kill_all(self) -> None:
        for run in self._runs:
            run.kill()

    def come_back(self) -> None:
        self.run(f"ip link set {DEVICE} up")

    def part(self) -> None:
        """Drop every packet from and to other hosts, silently; processes run on."""
        for chain, side in (("INPUT", "-i"), ("OUTPUT", "-o")):
            self.run(f"iptables -A {chain} {side} {DEVICE} -j DROP")

    def lose_packets(self, share: float) -> None:
        """Drop this share of the incoming packets, at random."""
        self.run(f"iptables -A INPUT -i {DEVICE} -m statistic --mode random --probability {share} -j DROP")

    def count_lost_packets(self) -> int:
        return sum(int(line.split()[0]) for line in self.run("iptables -nvxL INPUT").splitlines() if " DROP " in line)

    def heal(self) -> None:
        """Undo `part` and `lose_packets`."""
        self.run("iptables -F")

    def slow_down(self, kbits_per_s: int) -> None:
        """Limit what this host sends; the queue of up to a second makes latency, too."""
        self.run(f"tc qdisc add dev {DEVICE} root tbf rate {kbits_per_s}kbit burst 4kb latency 1s")


@contextlib.contextmanager
def several_hosts(num_hosts: int) -> Iterator[list[Host]]:
    """Yield hosts that reach each other; skips the test where the machine does not permit them."""
    reason = find_obstacle()
    if reason is not None:
        pytest.skip(f"hosts are network namespaces: {reason}")
    with contextlib.ExitStack() as stack:
        hosts = []
        try:
            switch = Namespace("switch")
            stack.callback(switch.close)
            switch.run("ip link add name switch type bridge")
            switch.run("ip link set switch up")
            for number in range(num_hosts):
                hosts.append(Host(number, switch))
                stack.callback(hosts[-1].close)
                stack.callback(hosts[-1].kill_all)
        except PermissionError as error:
            pytest.skip(f"hosts are network namespaces, which are not permitted here: {error}")
        yield hosts


def find_obstacle() -> str | None:
    """Why this machine cannot have them, or None."""
    if sys.platform != "linux" or not hasattr(os, "setns"):
        return "only Linux has them"
    if os.geteuid() != 0:
        return "they need root (sudo bash tests/run.sh tests/faults)"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"they need {', '.join(missing)} (packages iproute2, iptables, util-linux)" if missing else None
