"""Recipe + DeepSpeed JSON + number of ranks -> the run.

The DeepSpeed JSON owns ZeRO stage, offload, precision and communication; the recipe owns batch sizes, optimizer,
schedule and clipping. A value that both give is an error. Every conflict is listed at once, before any process group
exists, and nothing unresolved reaches ``deepspeed.initialize``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from toolkit.errors import UserError, as_one
from toolkit.files import read_text, write_text_atomically
from toolkit.recipe.batches import (
    MicroBatchChoice,
    batch_in_words,
    clip_limit,
    micro_batch_sizes,
    num_micro_batches,
    step_in_words,
)
from toolkit.recipe.compilation import compilation_problems
from toolkit.recipe.corpora import missing_data, problems_of_mix
from toolkit.recipe.deepspeed.cells import autocast_type, cell_of, cell_problem, offload_device, parameter_precision
from toolkit.recipe.deepspeed.combinations import PRECISIONS, combination_problems
from toolkit.recipe.deepspeed.compatibility import ZERO_STAGES
from toolkit.recipe.deepspeed.json_file import read_deepspeed
from toolkit.recipe.deepspeed.ownership import take_ownership
from toolkit.recipe.deepspeed.tensor_parallel import tensor_parallel_problems, tensor_parallel_size
from toolkit.recipe.load import load_recipe, read_recipe
from toolkit.recipe.mismatches import ctc_problems, mismatches
from toolkit.recipe.model_cards import architecture_of, card_of, check_vocabulary, reads_published, tiny_config
from toolkit.recipe.optimizers import loop_clips, optimizer_keys, optimizer_problems, optimizer_section
from toolkit.recipe.paths import swap_folder
from toolkit.recipe.schema import Evaluation, Recipe, Training
from toolkit.recipe.tree import Tree, value_at
from toolkit.recipe.yaml_text import dump_yaml

RECIPE_FILE = "recipe.yaml"
DEEPSPEED_FILE = "deepspeed.json"
MICRO_BATCH_FILE = "micro_batch.json"


@dataclass(frozen=True)
class ResolvedRun:
    """Everything that is decided before training, as a run directory stores it.

    ``deepspeed`` is exactly what ``deepspeed.initialize`` gets. It holds no scheduler: the training loop sets the
    learning rate, in optimizer steps.
    """

    recipe: Recipe
    deepspeed: Tree
    world_size: int  # ranks
    micro_batch_size: int  # clips in the largest forward pass; training.micro_batch_size is the limit that led to it
    accumulation_steps: (
        int  # forward passes per optimizer step; without training.micro_batch_frames, which may add some
    )
    run_dir: Path
    notes: tuple[str, ...] = ()  # what the user should know and need not change
    padding: Literal["longest", "ladder"] = "longest"  # what training.padding=auto became
    # What auto of training.micro_batch_size and of gradient_checkpointing became; None before, and without either.
    choice: MicroBatchChoice | None = None

    @property
    def clip_limit(self) -> int:
        """Clips of a forward pass of one rank, at most."""
        return self.choice.clips if self.choice else clip_limit(self.recipe.training)

    @property
    def frame_limit(self) -> int | None:
        """Padded frames of a forward pass of one rank, at most; None = no limit."""
        return self.choice.frames if self.choice else self.recipe.training.micro_batch_frames

    @property
    def recomputes(self) -> bool:
        """Whether backward passes recompute activations; of ``auto``, before it is chosen, they are kept."""
        own = self.recipe.training.gradient_checkpointing
        return bool(self.choice and self.choice.recomputes) if own == "auto" else own

    def recomputing(self, recomputes: bool) -> ResolvedRun:
        """The run with a recipe that says whether activations are recomputed."""
        training = self.recipe.training.model_copy(update={"gradient_checkpointing": recomputes})
        return replace(self, recipe=self.recipe.model_copy(update={"training": training}))

    @property
    def has_given_clips(self) -> bool:
        """Whether the recipe gives the clips of a micro-batch."""
        return self.recipe.training.micro_batch_size != "auto"

    @property
    def chosen_settings(self) -> str:
        """What the recipe leaves to ``choice``, as ``training.micro_batch_size=auto``."""
        names = ("micro_batch_size", "gradient_checkpointing")
        return ", ".join(f"training.{name}=auto" for name in names if getattr(self.recipe.training, name) == "auto")

    @property
    def may_recompute(self) -> tuple[bool, ...]:
        """What ``recomputes`` may become, what is tried first at first."""
        own = self.recipe.training.gradient_checkpointing
        if own != "auto":
            return (own,)
        return (False,) if self.recipe.training.compile == "graphs" else (False, True)

    @property
    def evaluation(self) -> Evaluation:
        """The recipe's section, with the generation batches that were chosen; without graphs of split layers."""
        own = self.recipe.evaluation
        if self.tensor_parallel_size > 1:
            own = own.model_copy(update={"graphs": False})
        chosen = self.choice and own.batch_frames == "auto" and self.choice.batch_frames
        return own.model_copy(update={"batch_frames": chosen}) if chosen else own

    @property
    def tensor_parallel_size(self) -> int:
        """Consecutive ranks that hold one copy of the model together (AutoTP); 1 = each has its own."""
        return tensor_parallel_size(self.deepspeed)

    @property
    def data_parallel_size(self) -> int:
        """Ranks, or groups of them, that share out the clips of a step."""
        return self.world_size // self.tensor_parallel_size

    @property
    def zero_stage(self) -> int:
        """0 to 3."""
        return int(value_at(self.deepspeed, "zero_optimization.stage") or 0)

    @property
    def precision(self) -> str:
        """The type of the model's parameters: ``fp32``, ``bf16`` or ``fp16``."""
        return parameter_precision(self.deepspeed)

    @property
    def autocast(self) -> str | None:
        """The type in which matrix products of fp32 parameters are computed (torch_autocast), or None."""
        return autocast_type(self.deepspeed)

    @property
    def batch(self) -> str:
        """The batch arithmetic in words."""
        training = self.recipe.training
        if self.choice is None:
            return step_in_words(training, self.data_parallel_size, self.tensor_parallel_size)
        return batch_in_words(
            training.global_batch_size, self.data_parallel_size, self.choice.clips, self.choice.frames
        )

    def with_choice(self, choice: MicroBatchChoice) -> ResolvedRun:
        """The run with the micro-batches that were chosen for it; its recipe still says ``auto``."""
        arithmetic = (self.recipe.training.global_batch_size, self.data_parallel_size, choice.clips)
        largest, accumulation = micro_batch_sizes(*arithmetic)[1], num_micro_batches(*arithmetic)
        keys = _batch_keys(self.data_parallel_size, largest, accumulation)
        return replace(
            self,
            choice=choice,
            deepspeed={**self.deepspeed, **keys},
            micro_batch_size=largest,
            accumulation_steps=accumulation,
        )

    def save(self, folder: Path) -> None:
        """Write recipe, DeepSpeed JSON and what ``auto`` became into ``folder``, each file whole or not at all."""
        write_text_atomically(folder / RECIPE_FILE, dump_yaml(self.recipe.model_dump(mode="json")))
        write_text_atomically(folder / DEEPSPEED_FILE, json.dumps(self.deepspeed, indent=2) + "\n")
        if self.choice:
            write_text_atomically(folder / MICRO_BATCH_FILE, json.dumps(asdict(self.choice), indent=2) + "\n")
        else:
            (folder / MICRO_BATCH_FILE).unlink(missing_ok=True)  # of the run before it was given a number

    @classmethod
    def load(cls, folder: Path) -> ResolvedRun:
        """Read back what ``save`` wrote; the run's directory is ``folder``.

        Raises:
            UserError: a file is missing or broken.
        """
        recipe = load_recipe(str(folder / RECIPE_FILE))
        path = folder / DEEPSPEED_FILE
        try:
            config = json.loads(read_text(path, "a resolved DeepSpeed JSON"))
            micro, accumulation = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]
            world_size = config["train_batch_size"] // (micro * accumulation) * tensor_parallel_size(config)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not the deepspeed.json of a run: {error}", "name another run.dir, or start again with --new"
            ) from error
        return cls(recipe, config, world_size, micro, accumulation, folder, choice=read_choice(folder))


def read_choice(folder: Path) -> MicroBatchChoice | None:
    """The micro-batches that were chosen for the run in ``folder``; None without any, or where the file is broken."""
    try:
        stored = json.loads((folder / MICRO_BATCH_FILE).read_text(encoding="utf-8"))
        choice = MicroBatchChoice(**stored)
        return choice if choice.clips >= 1 and (choice.frames is None or choice.frames >= 1) else None
    except (OSError, ValueError, TypeError):
        return None


def resolve_named(
    name_or_path: str,
    overrides: Sequence[str],
    world_size: int,
    *,
    has_gpu: bool,
    ds: str | None = None,
    needs_data: bool = True,
) -> ResolvedRun:
    """Read a recipe and resolve it; problems of the recipe and of the DeepSpeed JSON are listed together.

    Args and errors as for ``load_recipe`` and ``resolve``.
    """
    recipe, text = read_recipe(name_or_path, overrides, ds=ds)
    if recipe is not None:
        return resolve(recipe, world_size, has_gpu=has_gpu, needs_data=needs_data)
    problems = list(text.problems)
    config_name, over = text.tree.get("deepspeed"), text.tree.get("ds", {})
    if isinstance(config_name, str) and isinstance(over, dict):
        try:
            problems += read_deepspeed(config_name, over, world_size=world_size).problems
        except UserError as error:
            problems.append(error)
    raise as_one(problems, f"recipe {text.name}")


def resolve(recipe: Recipe, world_size: int, *, has_gpu: bool, needs_data: bool = True) -> ResolvedRun:
    """Put recipe, DeepSpeed JSON and number of ranks together.

    Without ``needs_data`` the recipe need not say where its data is: it is looked at and not trained.

    Raises:
        UserError: conflicts, unknown keys, and fewer clips in a step than ranks: all of them.
    """
    problems: list[UserError] = []
    if needs_data:
        problems.extend(missing_data(recipe))
    problems.extend(problems_of_mix(recipe))
    problems.extend(_model_problems(recipe))
    try:
        read = read_deepspeed(recipe.deepspeed, recipe.ds, world_size=world_size)
    except UserError as error:
        raise as_one(
            [*_batch_problems(recipe.training, world_size), *problems, error], f"recipe {recipe.name}"
        ) from error
    config, notes, architecture = read.config, read.notes, None
    copies = world_size // tensor_parallel_size(config) or world_size
    problems[:0] = _batch_problems(recipe.training, copies)
    problems.extend(read.problems)
    take_ownership(config, recipe, problems, notes)
    problems.extend(combination_problems(config, has_gpu=has_gpu, world_size=world_size))
    with contextlib.suppress(UserError):  # _model_problems has listed why
        architecture = architecture_of(recipe.model)
    problems.extend(_cell_problems(config, recipe, architecture))
    problems.extend(tensor_parallel_problems(recipe, config, world_size=world_size, architecture=architecture))
    problems.extend(compilation_problems(recipe, config))
    problems.extend(
        optimizer_problems(
            recipe.training,
            config,
            stage=value_at(config, "zero_optimization.stage") or 0,
            precision=parameter_precision(config),
            offload=offload_device(config, "optimizer"),
        )
    )
    if recipe.training.optimizer == "adamw8bit" and not has_gpu:
        notes.append("training.optimizer=adamw8bit is made for GPUs: on a CPU its step takes many times AdamW's")
    if problems:
        raise as_one(problems, f"recipe {recipe.name} with {recipe.deepspeed}")
    notes.extend(mismatches(recipe))
    run_dir = Path(recipe.run.dir or f"runs/{recipe.name}")
    training = recipe.training
    arithmetic = (training.global_batch_size, copies, clip_limit(training))
    smallest, largest = micro_batch_sizes(*arithmetic)
    accumulation = num_micro_batches(*arithmetic)
    run = ResolvedRun(
        recipe=recipe,
        deepspeed=_filled_in(config, training, copies, largest, accumulation, run_dir),
        world_size=world_size,
        micro_batch_size=largest,
        accumulation_steps=accumulation,
        run_dir=run_dir,
        padding=padding_of(training, has_gpu=has_gpu),
    )
    if training.micro_batch_size not in ("auto", smallest) and training.micro_batch_frames is None:
        notes.append(f"training.micro_batch_size={training.micro_batch_size} is an upper limit: {run.batch}")
    return replace(run, notes=tuple(notes))


def padding_of(training: Training, *, has_gpu: bool) -> Literal["longest", "ladder"]:
    """To what batches are padded; ``auto`` takes few lengths on GPUs and for graphs, and least padding on CPUs."""
    if training.padding == "auto":
        return "ladder" if has_gpu or training.compile == "graphs" else "longest"
    return training.padding


def _batch_problems(training: Training, world_size: int) -> Iterator[UserError]:
    total = training.global_batch_size
    if world_size < 1:
        yield UserError(f"{world_size} ranks are too few", "start at least 1")
    elif total < world_size:
        yield UserError(
            f"training.global_batch_size={total} has fewer clips than the {world_size} ranks that share them",
            f"start at most {total} ranks, or set training.global_batch_size={world_size} or more",
        )


def _model_problems(recipe: Recipe) -> Iterator[UserError]:
    model = recipe.model
    yield from ctc_problems(recipe)
    try:
        card = card_of(model)
        check_vocabulary(model)
        if model.tiny and card:
            tiny_config(card.architecture, card.config)
    except UserError as error:
        yield error
        return
    if not card or not reads_published(model):
        return
    if not card.hub_id:
        message = f"model.backbone={model.backbone} has no published weights"
        yield UserError(message, "add model.from_scratch=true")
    elif model.tokenizer in ("bytes", "train") and card.tokenizer != model.tokenizer:
        yield UserError(
            f"model.tokenizer={model.tokenizer}: the published weights of {model.backbone} have the vocabulary of "
            f"{card.tokenizer}",
            "leave model.tokenizer out, or add model.from_scratch=true",
        )


def _cell_problems(config: Tree, recipe: Recipe, architecture: str | None) -> Iterator[UserError]:
    """What the compatibility table refuses of this model with this DeepSpeed JSON."""
    if value_at(config, "zero_optimization.stage") not in (None, *ZERO_STAGES):
        return  # listed already
    if problem := cell_problem(cell_of(recipe, config, architecture), recipe.model.backbone):
        yield problem
    storage = recipe.model.quantization.storage_dtype if recipe.model.quantization else None
    if storage not in (None, parameter_precision(config)):
        yield UserError(
            f"model.quantization.storage_dtype={storage}, and the run holds its parameters in "
            f"{parameter_precision(config)}: DeepSpeed would cast the packed weights",
            "leave model.quantization.storage_dtype out",
        )


def _filled_in(
    config: Tree, training: Training, copies: int, micro_batch_size: int, accumulation: int, run_dir: Path
) -> Tree:
    """``config`` with the recipe's values, and with our defaults where DeepSpeed's would differ."""
    zero = {"stage": 0, **config.get("zero_optimization", {})}
    # DeepSpeed overlaps by default at stage 3, which has given NaN and wrong norms.
    zero.setdefault("overlap_comm", False)
    for section in ("offload_optimizer", "offload_param"):
        if value_at(zero, f"{section}.device") == "nvme":
            zero[section] = {**zero[section], "nvme_path": str(swap_folder(run_dir, zero[section].get("nvme_path")))}
    if training.optimizer == "muon" and zero["stage"] == 3:
        zero["reduce_scatter"] = False  # Muon orthogonalises whole gradients
    offloaded = offload_device(config, "optimizer") is not None
    # DeepSpeed reads bf16_master_weights_and_grads even where bf16 is off, so the section is removed.
    config = {key: value for key, value in config.items() if not (key in PRECISIONS and not value.get("enabled"))}
    return {
        **config,
        **optimizer_keys(training.optimizer, stage=zero["stage"], offloaded=offloaded),
        **_batch_keys(copies, micro_batch_size, accumulation),
        "gradient_clipping": 0.0 if loop_clips(config) else training.gradient_clipping,
        "optimizer": optimizer_section(training, dict(value_at(config, "optimizer.params") or {}), offloaded=offloaded),
        "zero_optimization": zero,
        # DeepSpeed's own timer waits for the GPU in every pass and every step, and ends the capture of a graph.
        "timers": {"throughput": {"enabled": False, **(value_at(config, "timers.throughput") or {})}},
    }


def _batch_keys(copies: int, micro_batch_size: int, accumulation: int) -> Tree:
    # DeepSpeed asserts that the first is the product of the others and the data-parallel ranks, as if all micro-batches
    # were of one size. It only counts samples by it, in its log: the loop marks the boundaries and scales the loss.
    return {
        "train_batch_size": micro_batch_size * accumulation * copies,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
    }
