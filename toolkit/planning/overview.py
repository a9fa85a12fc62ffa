"""One line of `launch/recipes.py ls --memory`: what a recipe trains, and what its model states take."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from toolkit.errors import UserError
from toolkit.planning.counts import count
from toolkit.planning.states import GIB, model_states
from toolkit.recipe.deepspeed.json_file import load_deepspeed
from toolkit.recipe.schema import Recipe


@dataclass(frozen=True)
class Overview:
    """A recipe at a glance.

    Attributes:
        name, model, deepspeed, description: as the recipe says.
        parameters: of the backbone at full size; None = known only once the hub model is read.
        trainable: of backbone and adapters, those that train.
        pose_encoder: parameters in front of the backbone, which always train.
        states_gib: model states on one GPU that trains alone, estimated by arithmetic.
        host_gib: model states in the host's memory, by the same arithmetic.
    """

    name: str
    model: str
    parameters: int | None
    trainable: int | None
    pose_encoder: int | None
    deepspeed: str
    states_gib: float | None
    host_gib: float | None
    description: str

    @property
    def states_in_words(self) -> str:
        """Model states for a table."""
        if self.states_gib is None:
            return "unknown"
        host = f" + {self.host_gib:.1f} host" if self.host_gib else ""
        return f"{self.states_gib:.1f} GiB{host}"

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def overview(recipe: Recipe) -> Overview:
    """A recipe at a glance, at full size; figures are None where the model is not known without the hub."""
    shown = {
        "name": recipe.name,
        "model": recipe.model.backbone,
        "deepspeed": recipe.deepspeed,
        "description": recipe.description,
    }
    try:
        counts = count(recipe)
    except UserError:
        return Overview(**shown, parameters=None, trainable=None, pose_encoder=None, states_gib=None, host_gib=None)
    states = model_states(counts, recipe, load_deepspeed(recipe.deepspeed, recipe.ds), world_size=1)
    return Overview(
        **shown,
        parameters=counts.backbone,
        trainable=counts.trainable,
        pose_encoder=counts.pose_encoder,
        states_gib=round(states.device / GIB, 2),
        host_gib=round(states.host / GIB, 2),
    )
