"""The rank's device, and how torch is set to use it, with pretended GPUs."""

import re

import pytest
import torch
from torch import distributed as dist

from toolkit.cluster.devices import barrier, check_bound, choose_device, own_device, use_device
from toolkit.cluster.ranks import Ranks
from toolkit.errors import UserError


@pytest.fixture
def gpus(monkeypatch):
    """Let torch say that it sees so many GPUs."""
    state = {"current": 0}

    def see(count):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: state["current"])
        monkeypatch.setattr(torch.cuda, "set_device", lambda index: state.update(current=index))

    return see


@pytest.mark.parametrize(
    ("visible", "local_rank", "device"),
    [
        (8, 3, "cuda:3"),
        (1, 3, "cuda:0"),  # a GPU of its own for each rank
        (1, 0, "cuda:0"),
        (0, 1, "cpu"),
    ],
)
def test_a_rank_takes_the_gpu_of_its_number_or_the_one_that_it_sees(gpus, visible, local_rank, device):
    gpus(visible)
    assert use_device(Ranks(11, local_rank, 16, 8)) == torch.device(device)
    assert own_device() == torch.device(device)


def test_a_command_without_ranks_uses_the_device_that_was_named(gpus):
    gpus(2)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert own_device() == torch.device("cuda", 1)
    assert choose_device(None) == torch.device("cuda", 1)
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("cuda") == torch.device("cuda", 0)
    gpus(0)
    assert choose_device(None) == torch.device("cpu")


@pytest.mark.parametrize("name", ["nowhere", "cuda:2", "cuda:9"])
def test_a_device_that_is_not_there_is_refused(gpus, name):
    gpus(2)
    with pytest.raises(UserError, match=f"--device {re.escape(name)}: "):
        choose_device(name)


def test_a_barrier_names_the_rank_s_gpu(gpus, monkeypatch):
    passed = []
    monkeypatch.setattr(dist, "barrier", lambda device_ids=None: passed.append(device_ids))
    gpus(4)
    use_device(Ranks(5, 1, 8, 4))
    barrier()
    gpus(0)
    barrier()
    assert passed == [[1], None]


class Group:
    """A process group, as far as the check looks at it."""

    def __init__(self, bound):
        self.bound_device_id = bound


@pytest.mark.parametrize(
    ("ranks", "bound", "wrong"),
    [
        (2, torch.device("cuda", 1), None),
        (2, torch.device("cuda", 0), "cuda:0"),
        (2, None, "None"),
        (1, None, None),  # DeepSpeed binds no group of one
    ],
)
def test_a_group_that_is_bound_to_another_gpu_is_found(gpus, monkeypatch, ranks, bound, wrong):
    gpus(4)
    use_device(Ranks(1, 1, 2, 2))
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(type(dist.group), "WORLD", property(lambda _: Group(bound)))
    if wrong is None:
        check_bound()
    else:
        with pytest.raises(RuntimeError, match=wrong):
            check_bound()
