"""The interface between nodes: NCCL's, else the one on the way to rank 0; a single node asks for none."""

from __future__ import annotations

import pytest

from toolkit.cluster import interfaces
from toolkit.cluster.interfaces import GLOO, NCCL, address_towards, choose_interface, name_interface, own_addresses
from toolkit.cluster.ranks import Ranks

NODE = {"docker0": ["172.17.0.1"], "eth0": ["10.0.0.2", "fe80::2"], "eth1": ["10.1.0.2"], "ib0": ["10.2.0.2"]}
TWO_NODES = Ranks(rank=8, local_rank=0, world_size=16, local_world_size=8)


@pytest.mark.parametrize(
    ("nccl", "towards", "chosen"),
    [
        ("", "10.1.0.2", "eth1"),
        ("", "fe80::2", "eth0"),
        ("ib", "10.0.0.2", "ib0"),
        ("eth", "10.1.0.2", "eth1"),
        ("eth", "10.2.0.2", "eth0"),
        ("ib,eth", "10.1.0.2", "eth1"),
        ("=eth1", "10.0.0.2", "eth1"),
        ("=eth", "10.0.0.2", None),
        ("^docker,eth0", "10.0.0.2", "eth1"),
        ("^=docker0", "10.2.0.2", "ib0"),
        ("", "127.0.1.1", None),
        ("", None, None),
    ],
)
def test_nccls_interface_comes_before_the_route_to_rank_0(nccl: str, towards: str | None, chosen: str | None) -> None:
    assert choose_interface(NODE, towards, nccl) == chosen


def test_an_only_interface_is_taken_where_a_node_knows_itself_by_its_loopback() -> None:
    assert choose_interface({"eth0": ["10.0.0.2"]}, "127.0.1.1") == "eth0"


def test_this_machine_has_addresses_and_a_way_to_itself() -> None:
    assert "127.0.0.1" not in [address for found in own_addresses().values() for address in found]
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert address_towards("no-such-host.invalid") is None


def test_gloos_interface_is_set_on_several_nodes_only_unless_the_user_set_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interfaces, "own_addresses", lambda: NODE)
    monkeypatch.setattr(interfaces, "address_towards", lambda host: "10.0.0.2")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv(GLOO, "")
    monkeypatch.setenv(NCCL, "")
    name_interface(Ranks(rank=1, local_rank=1, world_size=2, local_world_size=2))
    assert interfaces.os.environ[GLOO] == ""
    name_interface(TWO_NODES)
    assert interfaces.os.environ[GLOO] == "eth0"
    monkeypatch.setenv(GLOO, "mine")
    name_interface(TWO_NODES)
    assert interfaces.os.environ[GLOO] == "mine"
