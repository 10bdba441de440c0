"""The network interface for gloo: over which a node reaches the master, or the loopback where there is one node.

Gloo listens on the address that the host's name resolves to. That is often 127.0.0.1, which no other node can reach,
or one that other machines reach too, though only this one trains. The kernel's route to the master names the right
interface. NCCL finds an interface by itself.
"""

import ipaddress
import os
import socket

import psutil

from dft.launched import num_local, spans_nodes

VARIABLES = ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME")  # TP: of torch's RPC
LOOPBACK = "127.0.0.1"
SOMEWHERE_ELSE = "192.0.2.1"  # an address for documentation, which nobody has; its route is the default route


def set_gloo_interface() -> None:
    """Sets GLOO_SOCKET_IFNAME where a launcher has started processes, unless the user has set it.

    It must be called before the process joins a group.
    """
    master = os.environ.get("MASTER_ADDR")
    if num_local() is None or master is None or os.environ.get(VARIABLES[0]):
        return
    name = find_interface(master) if spans_nodes() else interface_of(LOOPBACK)
    if name is not None:
        for variable in VARIABLES:
            os.environ.setdefault(variable, name)


def find_interface(master: str) -> str | None:
    """The interface of the route to `master`; None if there is none, or only the loopback.

    On the master itself its name may resolve to the loopback. Then the interface of the default route is taken.
    """
    for host in (master, SOMEWHERE_ELSE):
        address = local_address(host)
        if address is not None and not ipaddress.ip_address(address).is_loopback:
            return interface_of(address)
    return None


def local_address(host: str) -> str | None:
    """The address that this machine has on the route to `host`; None if there is no route. Nothing is sent."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return probe.getsockname()[0].partition("%")[0]
    except OSError:
        return None


def interface_of(address: str) -> str | None:
    """The name of the interface that has an IPv4 or IPv6 address; None if none has it."""
    wanted = ipaddress.ip_address(address)
    for name, addresses in psutil.net_if_addrs().items():
        of_ip = [one.address for one in addresses if one.family in (socket.AF_INET, socket.AF_INET6)]
        if wanted in [ipaddress.ip_address(text.partition("%")[0]) for text in of_ip]:
            return name
    return None
