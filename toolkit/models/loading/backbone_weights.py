"""A backbone's weights, random or published, loaded one tensor at a time so that no rank holds a model too many.

A skeleton on the meta device is filled tensor by tensor. Each weight gets its final form before the next is read:
partitioned under ZeRO stage 3, packed into 4 or 8 bits where the recipe quantises, else cast to the run's dtype.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from toolkit.cluster.devices import own_device
from toolkit.cluster.ranks import read_ranks
from toolkit.errors import UserError
from toolkit.models.adaptation.extra_tokens import table_rows, widened
from toolkit.models.adaptation.quantisation import is_packed, packable, quantised
from toolkit.models.backbone import backbone_class, cast_position_tables
from toolkit.models.dtypes import TORCH_DTYPES
from toolkit.models.loading.base_model import Fingerprint, Override, TensorReader
from toolkit.models.loading.random_weights import Skeleton, make_skeleton
from toolkit.models.vocabulary.ids import renumber
from toolkit.models.vocabulary.tables import Trim
from toolkit.recipe.resolve import ResolvedRun
from toolkit.recipe.sections.model import Quantization


@dataclass(frozen=True)
class Placement:
    """The form in which a run holds a model's weights."""

    dtype: torch.dtype  # of all parameters that are not quantised
    device: torch.device  # where they live
    zero3: dict[str, Any] | None = None  # the DeepSpeed configuration when its stage 3 partitions the weights
    quantization: Quantization | None = None  # how the backbone's linear layers are packed, or None

    @property
    def fills(self) -> bool:
        """Whether this rank reads or draws the values; under stage 3 the others receive them."""
        return self.zero3 is None or distributed.get_rank() == 0


def placement_of(resolved: ResolvedRun) -> Placement:
    """Where the weights of a run go; a process outside of any process group holds them whole."""
    partitioned = resolved.zero_stage == 3 and distributed.is_initialized()
    zero3 = resolved.deepspeed if partitioned else None
    return placement_for(resolved.precision, resolved.recipe.model.quantization, zero3=zero3)


def placement_for(
    precision: str, quantization: Quantization | None, *, zero3: dict[str, Any] | None = None
) -> Placement:
    """The placement of a model that trains, or was trained, in this precision and quantisation."""
    # DeepSpeed moves whole weights from the CPU; packed or partitioned ones must be on the device already.
    stays = zero3 is not None or quantization is not None
    return Placement(
        dtype=TORCH_DTYPES[precision],
        device=own_device() if stays else torch.device("cpu"),
        zero3=zero3,
        quantization=quantization,
    )


def _as_it_is(source: TensorReader) -> TensorReader:
    return source


def random_backbone(
    config: PreTrainedConfig,
    placement: Placement,
    *,
    seed: int,
    fingerprint: Fingerprint | None = None,
    override: Override = _as_it_is,
    trim: Trim | None = None,
) -> PreTrainedModel:
    """A backbone with random weights, drawn from transformers' distributions.

    The same seed gives the same weights, whatever the placement; under stage 3 all ranks call this. The override reads
    others in place of some, and the fingerprint hashes the weights, on ranks that have whole ones. Rows of a trimmed
    vocabulary are those that whole tables would have.

    Raises:
        UserError: the architecture does not say how its weights are initialised.
    """
    skeleton = make_skeleton(config)
    try:
        read = override(_drawn(skeleton, seed, trim)) if placement.fills else _unread
        return fill_skeleton(skeleton, read, placement, fingerprint)
    except NotImplementedError as error:
        raise UserError(str(error), "train it from published weights: model.from_scratch=false") from error


def _drawn(skeleton: Skeleton, seed: int, trim: Trim | None) -> TensorReader:
    if trim is None:
        return lambda name, tensor: skeleton.draw(tensor, name, seed)
    whole = make_skeleton(trim.config)
    tensors: dict[str, Tensor] = dict(whole.model.named_parameters(remove_duplicate=False))
    tensors |= dict(whole.model.named_buffers(remove_duplicate=False))
    return trim.watch(lambda name, _: whole.draw(tensors[name], name, seed), skeleton.model)


def published_backbone(
    source: str,
    config: PreTrainedConfig,
    placement: Placement,
    *,
    trust_remote_code: bool = False,
    fingerprint: Fingerprint | None = None,
    override: Override = _as_it_is,
    trim: Trim | None = None,
) -> PreTrainedModel:
    """A backbone with the weights of a hub id or folder, or those that the override reads in place of some.

    transformers maps the files into memory, and each weight is read from them when it is needed. Under ZeRO stage 3
    rank 0 alone reads; the others receive one weight after the other and keep their partition.

    Rows for tokens that the files lack become zero; of a trimmed vocabulary the kept rows are read. The fingerprint
    hashes the weights on ranks that read them.

    Raises:
        OSError, ValueError: there is no such model.
        UserError: its files lack weights, or hold them in other shapes.
    """
    # For a repository without safetensors, transformers would ask a service on the internet, in a thread that outlives
    # the loading, to open a pull request with some.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    skeleton = make_skeleton(config, trust_remote_code=trust_remote_code)
    with contextlib.suppress(OSError):  # where none was published, the one made from the configuration stays
        skeleton.model.generation_config = GenerationConfig.from_pretrained(source)
        if trim:
            renumber(skeleton.model.generation_config, trim.trimming.new_ids)
    if not placement.fills:
        return fill_skeleton(skeleton, _unread, placement)
    # By its own configuration: ours may leave room for more tokens.
    loaded, info = backbone_class(config).from_pretrained(
        source,
        dtype="auto",
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # listed in ``info`` instead
    )
    parameters = dict(loaded.named_parameters(remove_duplicate=False))
    _check_complete(source, info, parameters, (make_skeleton(trim.config) if trim else skeleton).model)
    tensors: dict[str, Tensor] = {**parameters, **dict(loaded.named_buffers(remove_duplicate=False))}

    def read(name: str, like: Tensor) -> Tensor:
        values = tensors[name].detach()
        if name in parameters:
            parameters[name].data = torch.empty(0)  # frees its memory
        return widened(values, like)

    whole = trim.watch(read, skeleton.model) if trim else read
    return fill_skeleton(skeleton, override(whole), placement, fingerprint)


def place_added_modules(model: PreTrainedModel, placement: Placement) -> None:
    """Cast and move what was added to the backbone (pose encoder, heads, adapters) as the placement asks.

    DeepSpeed does so with a whole model, and expects one with partitioned weights to be ready.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "ds_id") and not is_packed(parameter):
            parameter.data = parameter.data.to(placement.dtype)
    cast_position_tables(model, placement.dtype)
    if placement.zero3 is not None:
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(placement.device))


def fill_skeleton(
    skeleton: Skeleton, source: TensorReader, placement: Placement, fingerprint: Fingerprint | None = None
) -> PreTrainedModel:
    """The skeleton's model with its weights; parameters that are tied stay tied."""
    if fingerprint:
        source = fingerprint.watch(source)
    model = skeleton.model
    places = defaultdict(list)
    for module in model.modules():
        for name, tensor in _own_tensors(module):
            places[id(tensor)].append((module, name))
    to_pack = packable(model, placement.quantization) if placement.quantization else set()
    partition = _Partitioner(placement.zero3) if placement.zero3 else None
    with _progress_bar(sum(weight.numel() for weight in model.parameters())) as bar:
        # The largest first: what has its final form is held beside the whole tensor that is drawn, read or cast.
        for path, module in sorted(model.named_modules(), key=_largest, reverse=True):
            for name, tensor in list(_own_tensors(module)):
                if tensor.device.type != "meta":
                    continue  # tied to one that came before
                is_parameter = isinstance(tensor, nn.Parameter)
                whole = _values(f"{path}.{name}" if path else name, tensor, source, placement)
                filled = nn.Parameter(whole, requires_grad=tensor.requires_grad) if is_parameter else whole
                for holder, attribute in places[id(tensor)]:
                    setattr(holder, attribute, filled)
                bar.update(tensor.numel() if is_parameter else 0)
            if path in to_pack:
                assert placement.quantization
                module = quantised(module, placement.quantization, placement.dtype)
                model.set_submodule(path, module)
            if partition:
                for parameter in module.parameters(recurse=False):
                    partition(parameter)
    return model


def _largest(named: tuple[str, nn.Module]) -> int:
    return max((tensor.numel() for _, tensor in _own_tensors(named[1])), default=0)


def _progress_bar(weights: int) -> tqdm:
    """Weights that are ready, and the time left, on one rank of a node; in a log file a line every ten seconds."""
    tqdm.monitor_interval = 0  # its thread would be running when processes are forked
    return tqdm(
        total=weights,
        desc="building the backbone",
        unit=" weights",
        unit_scale=True,
        delay=3,
        mininterval=0.2 if sys.stderr.isatty() else 10,
        miniters=1,  # a table of tokens counts as much as many layers, from which no pace follows
        disable=not read_ranks().is_local_main,
    )


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _values(name: str, tensor: Tensor, source: TensorReader, placement: Placement) -> Tensor:
    """Values for one tensor of the skeleton, in the run's dtype and on its device, on every rank."""
    dtype = placement.dtype if isinstance(tensor, nn.Parameter) else tensor.dtype
    if placement.fills:
        values = source(name, tensor).to(placement.device, dtype).contiguous()
    else:
        values = torch.empty(tensor.shape, dtype=dtype, device=placement.device)
    if placement.zero3 is not None:
        distributed.broadcast(values.view(-1).view(torch.uint8), src=0)  # as bytes: backends lack some dtypes
    return values


class _Partitioner:
    """Partitions parameters over the ranks, one by one, as DeepSpeed's stage 3 does."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.first: Any = None  # a parameter, to which DeepSpeed has given methods

    def __call__(self, parameter: nn.Parameter) -> None:
        import deepspeed

        if hasattr(parameter, "ds_id"):
            return  # tied to one that is partitioned already
        if self.first is None:
            self.first = parameter
            deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=copy.deepcopy(self.config))
        else:
            # By the settings of the first one; reading the configuration for each parameter takes longer.
            self.first.convert_to_zero_parameters(param_list=[parameter])


def _check_complete(
    source: str, info: dict[str, Any], parameters: dict[str, nn.Parameter], skeleton: PreTrainedModel
) -> None:
    """Raise UserError where transformers would fill gaps with random numbers or give up tying."""
    tied_to = {id(parameter): name for name, parameter in reversed(list(skeleton.named_parameters()))}
    rows = table_rows(skeleton.config)
    problems = {
        "missing": [name for name in info["missing_keys"] if name in parameters],
        "of another shape": [
            *(entry[0] for entry in info["mismatched_keys"]),
            *(
                name
                for name, parameter in skeleton.named_parameters()
                if name in parameters and not _fits(parameters[name].shape, parameter.shape, rows)
            ),
        ],
        "absent": [name for name, _ in skeleton.named_parameters() if name not in parameters],
        "different though tied": [
            name
            for name, parameter in skeleton.named_parameters(remove_duplicate=False)
            if parameters.get(name) is not parameters.get(tied_to[id(parameter)])
        ],
    }
    listed = "; ".join(f"{what}: {', '.join(sorted(names)[:5])}" for what, names in problems.items() if names)
    if listed:
        raise UserError(
            f"the weights in {source} are not those of a {type(skeleton).__name__} with its configuration ({listed})",
            "download or save the model again, or set model.from_scratch=true for random weights",
        )


def _fits(published: torch.Size, wanted: torch.Size, rows: set[Any]) -> bool:
    """Whether a weight has the wanted shape, but for rows of tokens that were added."""
    return len(published) == len(wanted) and all(
        have == want or (have < want and want in rows) for have, want in zip(published, wanted, strict=True)
    )


def _unread(name: str, _: Tensor) -> Tensor:
    raise AssertionError(f"{name} is read by rank 0 alone")
