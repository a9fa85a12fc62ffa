"""torch's operators for GPUs, replaced by kernels for CPUs; ``tests/pretended_cuda/__init__.py`` says what for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from pretended_operators import attention, layers, report, runtime
from pretended_operators.computed import computed
from pretended_operators.runtime import counts

__all__ = ["counts", "install", "install_quantisation"]

# They allocate, copy by the runtime, or look at what is on the host: torch's own do.
OWN = frozenset(
    {
        *("empty", "empty_strided", "_efficientzerotensor", "set_", "resize_", "record_stream", "is_set_to"),
        *("is_pinned", "_pin_memory", "_local_scalar_dense", "_fused_sdp_choice"),
    }
)
# Of tensors that are not plain memory; their own kernels are refused where they are launched.
OTHER_LAYOUTS = ("quant", "sparse", "nested", "mkldnn")
FOR_CPUS = ("CPU", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional", "CompositeImplicitAutograd")
NO = frozenset({"_use_cudnn_ctc_loss", "_use_miopen_ctc_loss"})  # questions whether a kernel is to be used

_library = torch.library.Library("aten", "IMPL")
_of_bitsandbytes = torch.library.Library("bitsandbytes", "FRAGMENT")


def install() -> None:
    """Replace torch's operators, unless the runtime only counts."""
    if runtime.setting("PRETENDED_CUDA_REPORT", "0"):
        report.begin()
    if not runtime.setting("PRETENDED_CUDA_NUMBERS", "1"):
        return
    own_copy = torch.library.get_kernel("aten::copy_", "CUDA")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore")  # of kernels that are replaced, which is what is meant
        for name, kernel in _kernels().items():
            _library.impl(name, kernel, "CUDA")
        _library.impl("copy_", _copy(own_copy), "CUDA", with_keyset=True)
    if not runtime.setting("PRETENDED_CUDA_TRITON", "0"):
        torch._TorchCompileInductorWrapper.__call__ = _compile_as_eager


def install_quantisation() -> None:
    """Replace the operators of bitsandbytes, unless the runtime only counts."""
    if not runtime.setting("PRETENDED_CUDA_NUMBERS", "1"):
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore")
        for full_name in torch._C._dispatch_get_all_op_names():
            room, _, name = full_name.partition("::")
            base, _, overload = name.partition(".")
            if room == "bitsandbytes" and torch._C._dispatch_has_kernel_for_dispatch_key(full_name, "CUDA"):
                operator = getattr(getattr(torch.ops.bitsandbytes, base), overload or "default")
                _of_bitsandbytes.impl(name, computed(operator), "CUDA", allow_override=True)


def _kernels() -> dict[str, Callable[..., Any]]:
    """By the operator's name and overload."""
    written = attention.KERNELS | layers.KERNELS
    found: dict[str, Callable[..., Any]] = {}
    for full_name in torch._C._dispatch_get_all_op_names():
        room, _, name = full_name.partition("::")
        base, _, overload = name.partition(".")
        if room != "aten" or not torch._C._dispatch_has_kernel_for_dispatch_key(full_name, "CUDA"):
            continue
        if base in OWN or base == "copy_" or any(word in base for word in OTHER_LAYOUTS):
            continue
        operator = getattr(getattr(torch.ops.aten, base), overload or "default", None)
        if operator is None or _is_view(operator._schema):
            continue
        if name in written:
            found[name] = computed(operator, written[name])
        elif base in NO:
            found[name] = _answer_no
        elif any(torch._C._dispatch_has_kernel_for_dispatch_key(full_name, key) for key in FOR_CPUS):
            found[name] = computed(operator)
        else:
            found[name] = _refused(full_name)
    return found


def _is_view(schema: Any) -> bool:
    infos = [result.alias_info for result in schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


def _answer_no(*given: Any, **more: Any) -> bool:
    return False


def _refused(name: str) -> Callable[..., Any]:
    def kernel(*given: Any, **more: Any) -> Any:
        raise NotImplementedError(f"the pretended CUDA runtime does not compute {name}, which CPUs have no kernel for")

    return kernel


def _copy(own: Any) -> Callable[..., Any]:
    """Copies are the runtime's where memory is copied as it is; between other tensors of a GPU the CPU copies.

    torch's own copy between host and GPU converts by other operators before it comes here again.
    """
    between = computed(torch.ops.aten.copy_.default)

    def kernel(keys: Any, to: Any, source: Any, non_blocking: bool = False) -> Any:
        is_within = to.device.type == source.device.type == "cuda"
        is_plain = (
            (to.dtype, to.shape, to.is_conj(), to.is_neg())
            == (source.dtype, source.shape, source.is_conj(), source.is_neg())
            and to.is_contiguous()
            and source.is_contiguous()
        )
        if is_within and not is_plain:
            return between(to, source, non_blocking)
        return own.call_boxed(keys, to, source, non_blocking)

    return kernel


def _compile_as_eager(self: Any, module: Any, inputs: Any) -> Any:
    """In Inductor's place: what a layer's kernels would be runs as torch's operators, and so has numbers."""
    from torch._dynamo.backends.debugging import aot_eager

    return aot_eager(module, inputs)
