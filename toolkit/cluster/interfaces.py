"""The network interface by which the nodes of a run reach each other, set for gloo, which does not find it itself.

By default gloo takes the address that the machine's own name resolves to, often one that other nodes cannot reach.
Checkpoints use gloo on GPUs, too, where users set an interface for NCCL at most.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence

import psutil

from toolkit.cluster.ranks import Ranks

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
ANY_PORT = 9  # nothing is sent there


def name_interface(ranks: Ranks) -> None:
    """Set gloo's interface between the nodes, before the first group is made.

    One node needs none, and GLOO_SOCKET_IFNAME of the user stays.
    """
    if ranks.world_size == ranks.local_world_size or os.environ.get(GLOO):
        return
    if name := choose_interface(own_addresses(), address_towards(os.environ["MASTER_ADDR"]), os.environ.get(NCCL, "")):
        os.environ[GLOO] = name


def choose_interface(addresses: Mapping[str, Sequence[str]], towards_rank_0: str | None, nccl: str = "") -> str | None:
    """The interface between the nodes; None where it cannot be known.

    Args:
        addresses: of each interface that is up, but for the loopback.
        towards_rank_0: this node's address on the way to rank 0, if there is a way.
        nccl: the user's NCCL_SOCKET_IFNAME: names or prefixes of them.
    """
    allowed = [name for name in addresses if is_allowed(name, nccl)]
    on_the_way = [name for name in allowed if towards_rank_0 in addresses[name]]
    # Rank 0's own node may reach itself by its loopback alone; then a single interface, or NCCL's, is taken.
    others = allowed if nccl or len(allowed) == 1 else []
    return next(iter([*on_the_way, *others]), None)


def is_allowed(name: str, nccl: str) -> bool:
    """Whether NCCL would use an interface: ``eth,ib`` are prefixes, ``=eth0`` is a name, and ``^`` excludes."""
    excludes = nccl.startswith("^")
    words = nccl.removeprefix("^")
    exact = words.startswith("=")
    listed = [word for word in words.removeprefix("=").split(",") if word]
    if not listed:
        return True
    found = name in listed if exact else name.startswith(tuple(listed))
    return found != excludes


def own_addresses() -> dict[str, list[str]]:
    """The IP addresses of each interface of this node that is up, but for the loopback."""
    states = psutil.net_if_stats()
    addresses = {
        name: [entry.address.split("%")[0] for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)]
        for name, entries in psutil.net_if_addrs().items()
        if name in states and states[name].isup and "loopback" not in states[name].flags
    }
    return {name: found for name, found in addresses.items() if found}


def address_towards(host: str) -> str | None:
    """This node's address on the way to another, by the system's routes; nothing is sent."""
    try:
        found = socket.getaddrinfo(host, ANY_PORT, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                return str(probe.getsockname()[0]).split("%")[0]
        except OSError:
            continue
    return None
