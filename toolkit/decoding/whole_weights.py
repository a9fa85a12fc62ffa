"""The weights that ZeRO stage 3 has cut into pieces, whole for the length of an evaluation.

Gathered once they cost one pass over the network; gathered layer by layer they cost one for every token of every batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def whole_weights(engine: Any, *, gather: bool) -> Iterator[bool]:
    """Within it every rank holds all weights and may generate at its own pace. All ranks must enter, and agree.

    Args:
        engine: the DeepSpeed engine, at any stage.
        gather: whether there is room for them (``toolkit.planning.memory.fits_whole``); no matter below stage 3.

    Yields:
        whether ranks must generate in step, because every layer is gathered when it is needed.
    """
    import deepspeed

    if engine.zero_optimization_stage() < 3:
        yield False
    elif not gather:
        yield True
    else:
        # Gathering alone would not do: DeepSpeed's hooks let go of each layer's weights after its first use.
        with deepspeed.zero.unwrap_model_for_generation(engine):
            yield False


def cut(model: Any, world_size: int) -> Any:
    """Cut a model's weights over the ranks, for evaluation alone; the process group must be there.

    Returns:
        a DeepSpeed engine at stage 3 without an optimizer.
    """
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": world_size,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine
