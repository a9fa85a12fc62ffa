"""Floating-point operations of the model, counted from its matrix products, and the peak of the device.

Model FLOPs are a multiplication and an addition of every matrix product, forward once and backward twice (once where
the weight is frozen). Recomputation by gradient checkpointing and element-wise operations do not count. Their share of
the device's peak is the model-FLOPs utilisation, MFU (Chowdhery et al. 2022, "PaLM", arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.batching.collate import Batch
from toolkit.cluster.tensor_parallel import part_of
from toolkit.cpu.linear import has_fast_bf16
from toolkit.models.backbone import halves, reader, stack_layers
from toolkit.models.compiled import uncompiled
from toolkit.planning.hardware import MEASURED_ROWS

PEAK_TRIALS = 4


@dataclass(frozen=True)
class Cost:
    """What training on a batch costs, in FLOPs."""

    per_frame: float  # matrix products over frames or what the pose encoder makes of them, for each padded frame
    per_token: float  # matrix products over target tokens, for each padded token
    positions_per_frame: float  # encoder positions for each padded frame
    encoder_attention: float  # for each pair of encoder positions of a clip
    decoder_attention: float  # for each pair of a target token and what it attends to: tokens and encoder positions
    directions: int = 1  # in which tokens and positions attend to each other; a language model's mask hides one of two

    def of(self, batch: Batch) -> float:
        """The FLOPs of one forward and backward pass over a batch, padding included."""
        clips, frames = batch.frame_mask.shape
        tokens = batch.labels.shape[1]
        positions = frames * self.positions_per_frame
        return clips * (
            frames * self.per_frame
            + tokens * self.per_token
            + positions**2 * self.encoder_attention
            + tokens * (tokens + self.directions * positions) * self.decoder_attention
        )


class CostRecorder:
    """Records one forward pass of a translator, from which the cost of any other follows. A context manager.

    Hooks read the sizes of input and output of every linear layer and convolution, so it does not matter how DeepSpeed,
    PEFT or bitsandbytes store the weight. Attention is computed from the shapes, without the pose encoder's.
    """

    def __init__(self, model: Any, batch: Batch) -> None:
        self._model = model
        self._batch = batch
        self._positions = 0
        self._seen: list[tuple[bool, int, float]] = []  # in the decoder, rows, FLOPs
        self._handles: list[Any] = []

    def __enter__(self) -> CostRecorder:
        backbone = self._model.backbone
        parts = [self._model.pose_encoder, halves(backbone)[0]]
        of_encoder = {id(module) for part in parts if part is not None for module in part.modules()}
        self._handles = [reader(backbone).register_forward_hook(self._see_reader)]
        for module in self._model.modules():
            if _is_product(module) or part_of(getattr(module, "weight", None)):
                in_decoder = id(module) not in of_encoder and module is not getattr(self._model, "ctc_head", None)
                self._handles.append(
                    module.register_forward_hook(
                        lambda module, inputs, output, decoder=in_decoder: self._see(module, inputs, output, decoder)
                    )
                )
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def cost(self) -> Cost | None:
        """The cost; None where no matrix product was recorded, as in a compiled model."""
        clips, frames = self._batch.frame_mask.shape
        tokens = self._batch.labels.shape[1]
        if not self._seen or not self._positions:
            return None
        # The decoder's cross-attention reads the encoder's positions: as many rows, unless texts are just as long. A
        # language model's layers read both.
        encoder, decoder = halves(self._model.backbone)
        read = self._positions + (0 if encoder else tokens)
        of_positions = self._positions / read
        both = sum(cost for in_decoder, rows, cost in self._seen if in_decoder and rows == clips * read)
        over_frames = of_positions * both + sum(cost for in_decoder, _, cost in self._seen if not in_decoder)
        over_tokens = sum(cost for _, _, cost in self._seen) - over_frames
        # Scores and weighted sum are a product each; forward and twice backward.
        pair = 3 * 2 * 2 * attention_width(self._model.backbone.config)
        return Cost(
            per_frame=over_frames / (clips * frames),
            per_token=over_tokens / (clips * tokens),
            positions_per_frame=self._positions / frames,
            encoder_attention=len(stack_layers(encoder or decoder)) * pair,
            decoder_attention=len(stack_layers(decoder)) * pair,
            directions=1 if encoder else 2,
        )

    def _see_reader(self, module: nn.Module, inputs: Any, output: Any) -> None:
        tokens = 0 if halves(self._model.backbone)[0] else self._batch.labels.shape[1]
        self._positions = output.last_hidden_state.shape[1] - tokens

    def _see(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, in_decoder: bool) -> None:
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            taps = math.prod(module.kernel_size) * module.in_channels // module.groups
            forward = 2.0 * output.numel() * taps
            rows = output.numel() // module.out_channels
        else:
            forward = 2.0 * inputs[0].numel() * output.shape[-1]
            rows = inputs[0].numel() // inputs[0].shape[-1]
        weight = getattr(module, "weight", None)
        if part := part_of(weight):
            forward *= part.of
        trained = weight is not None and weight.requires_grad
        self._seen.append((in_decoder, rows, forward * (3 if trained else 2)))


def cost_beside_training(model: Any, batch: Batch) -> Cost | None:
    """The cost from a forward pass of its own, which changes neither gradients nor random states.

    For a model whose layers are compiled, as the hooks of a recorder would become part of their graphs, or recomputed.
    """
    devices = [batch.poses.device] if batch.poses.device.type == "cuda" else []
    with uncompiled(model), torch.random.fork_rng(devices), torch.no_grad(), CostRecorder(model, batch) as recorder:
        model(
            **batch.inputs,
            labels=batch.labels,
            labelled=batch.labelled,
        )
    return recorder.cost()


def _is_product(module: nn.Module) -> bool:
    """Linear layers (bitsandbytes' are subclasses), GPT-2's way to write them, and convolutions."""
    return isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) or type(module).__name__ == "Conv1D"


def attention_width(config: Any) -> int:
    """Heads times their width, of a backbone's configuration."""
    if hasattr(config, "d_kv"):
        return int(config.num_heads * config.d_kv)
    if getattr(config, "head_dim", None):
        return int(config.num_attention_heads * config.head_dim)
    return int(getattr(config, "decoder", config).hidden_size)


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product on one rank, in a fraction of a second.

    It is measured where and as the training runs (threads, clock, other ranks), so MFU needs no table of devices. On a
    CPU without fast bf16, where linear layers multiply in fp32 and a bf16 product of this size takes seconds, it is the
    peak of fp32.
    """
    if device.type == "cpu" and dtype == torch.bfloat16 and not has_fast_bf16():
        dtype = torch.float32
    size = MEASURED_ROWS if device.type == "cuda" else 1024
    # A generator of its own: torch's has the state of the checkpoint from which the run resumes.
    generator = torch.Generator(device).manual_seed(0)
    left, right = torch.randn(2, size, size, device=device, dtype=dtype, generator=generator)
    seconds = []
    for _ in range(PEAK_TRIALS):
        _synchronize(device)
        started = time.perf_counter()
        torch.mm(left, right)
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2.0 * size**3 / min(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
