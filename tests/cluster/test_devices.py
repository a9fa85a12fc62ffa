"""The rank's device, and how torch is set to use it, with pretended GPUs."""

import inspect
import re
import warnings

import pytest
import torch
from torch import distributed as dist

from toolkit.cluster.devices import (
    UNBOUND_BARRIER,
    attention_kernels,
    barrier,
    check_bound,
    choose_device,
    own_device,
    unseen_gpus,
    use_device,
)
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


@pytest.mark.parametrize(
    ("there", "seen", "visible", "version", "said"),
    [
        (2, 0, "7", "13.0", ("2 GPUs", "CUDA 13.0", "CUDA_VISIBLE_DEVICES=7")),
        (1, 0, None, "13.0", ("1 GPU ", "CUDA 13.0")),
        (1, 0, None, None, ("built without CUDA",)),
        (1, 1, None, "13.0", ()),
        (2, 0, "", "13.0", ()),  # hidden on purpose
        (0, 0, None, "13.0", ()),
    ],
)
def test_gpus_that_torch_does_not_see_are_a_note(gpus, monkeypatch, tmp_path, there, seen, visible, version, said):
    gpus(seen)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.version, "cuda", version)
    for number in range(there):
        (tmp_path / "gpus" / str(number)).mkdir(parents=True)
    note = unseen_gpus(tmp_path / "gpus")
    assert bool(note) == bool(said) and all(part in (note or "") for part in said)


@pytest.fixture
def fresh_attention():
    """cuDNN's attention is enabled, as torch starts with it."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize("choose", [lambda: use_device(Ranks(1, 1, 2, 2)), lambda: choose_device("cuda:1")])
def test_cudnn_has_no_part_in_attention_on_gpus(gpus, fresh_attention, choose):
    gpus(2)
    assert "cudnn" in attention_kernels()
    choose()
    assert attention_kernels() == ["flash", "memory-efficient", "math"]
    assert not hasattr(torch.backends, "python_native") or not torch.backends.python_native.triton.enabled


def test_a_cpu_has_one_attention_kernel(gpus):
    gpus(0)
    assert attention_kernels() == ["cpu"]


@pytest.mark.parametrize(("ranks", "heard"), [(1, 0), (2, 1)])
def test_barriers_of_a_single_rank_are_not_warned_of(gpus, monkeypatch, ranks, heard):
    gpus(1)
    use_device(Ranks(0, 0, ranks, ranks))
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    monkeypatch.setattr(type(dist.group), "WORLD", property(lambda _: Group(torch.device("cuda", 0))))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_bound()
        warnings.warn("barrier(): using the device under current context. You can", stacklevel=1)
    assert len(caught) == heard


def test_torch_still_words_that_warning_so():
    source = re.sub(r'"\s+"', "", inspect.getsource(inspect.unwrap(dist.barrier)))
    assert re.search(UNBOUND_BARRIER, source)
