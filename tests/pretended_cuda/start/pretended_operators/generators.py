"""The generators of a GPU, which torch's own kernels advance, and which refuse numbers where a capture has failed."""

from __future__ import annotations

from typing import Any

import torch

from pretended_operators import runtime

# They draw, and have no argument for it; all others have a generator.
DRAWING = frozenset({"native_dropout"})

_own_uniform = torch.library.get_kernel("aten::uniform_", "CUDA")
_keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def draws(name: str, named: dict[str, Any], has_generator: bool) -> bool:
    """Whether an operator draws random numbers with these arguments."""
    if name == "native_dropout" and named.get("train") is False:
        return False
    return has_generator or name in DRAWING or bool(named.get("dropout_p"))


def draw(device: torch.device, generator: torch.Generator | None) -> None:
    """Draw one number by torch's own kernel: the generator's state changes, and a graph's is registered.

    Raises:
        RuntimeError: the generator is within a capture and the stream is not, as after one that failed.
    """
    number = torch.empty(1, device=device)
    with runtime.without_numbers():
        _own_uniform.call_boxed(_keys, number, 0.0, 1.0, generator=generator)
