"""An engine for evaluation under ZeRO stage 3, and its partitioned weights gathered for the length of an evaluation.

Gathered once they cost one pass over the network; gathered layer by layer they cost one for every token of every batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from toolkit.models.loading.partitioned import load_partitioned


@contextmanager
def whole_weights(engine: Any, *, gather: bool) -> Iterator[bool]:
    """Within it every rank holds all weights and may generate at its own pace. All ranks must enter, and agree.

    Args:
        engine: the DeepSpeed engine, at any stage.
        gather: whether there is room for them (``toolkit.planning.memory.fits_whole``); ignored below stage 3.

    Yields:
        whether ranks must generate in step, because every layer is gathered when it is needed.
    """
    import deepspeed

    if engine.zero_optimization_stage() < 3:
        yield False
    elif not gather:
        yield True
    else:
        # DeepSpeed's hooks would partition each layer's weights again after their first use; this removes them.
        with deepspeed.zero.unwrap_model_for_generation(engine):
            yield False


def partitioned_engine(name: str, world_size: int) -> Any:
    """A DeepSpeed engine at stage 3 without an optimizer, for evaluation of a model folder, run or hub id.

    All ranks of the process group, which must be there, call this.
    """
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": world_size,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3},
    }
    engine, *_ = deepspeed.initialize(model=load_partitioned(name, config), config=config)
    return engine
