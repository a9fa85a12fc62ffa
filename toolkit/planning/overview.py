"""What a recipe trains and what its model states take, for a row of `launch/recipes.py ls --memory`."""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.errors import UserError
from toolkit.planning.costs.counts import count
from toolkit.planning.costs.zero import zero_memory
from toolkit.planning.hardware import GIB
from toolkit.recipe.deepspeed.json_file import load_deepspeed
from toolkit.recipe.schema import Recipe


@dataclass(frozen=True)
class Overview:
    """Figures of a recipe at full size; None where the model is not known without the hub.

    Attributes:
        parameters: of the backbone.
        trainable: of backbone and adapters, those that train.
        pose_encoder: parameters in front of the backbone, which always train.
        states_gib: model states on one GPU that trains alone, estimated by arithmetic.
        host_gib: model states in the host's memory, by the same arithmetic.
    """

    parameters: int | None = None
    trainable: int | None = None
    pose_encoder: int | None = None
    states_gib: float | None = None
    host_gib: float | None = None

    @property
    def states(self) -> str:
        """Model states for a table."""
        if self.states_gib is None:
            return "unknown"
        host = f" + {self.host_gib:.1f} host" if self.host_gib else ""
        return f"{self.states_gib:.1f} GiB{host}"


def overview(recipe: Recipe) -> Overview:
    """Count a recipe's model."""
    try:
        counts = count(recipe)
    except UserError:
        return Overview()
    states = zero_memory(counts.weights, recipe, load_deepspeed(recipe.deepspeed, recipe.ds), world_size=1)
    return Overview(
        parameters=counts.backbone,
        trainable=counts.trainable,
        pose_encoder=counts.pose_encoder,
        states_gib=states.device / GIB,
        host_gib=states.host / GIB,
    )
