"""Every DeepSpeed JSON for one recipe and hardware: which fit, which is fastest, what to change where none fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from toolkit.errors import UserError
from toolkit.planning.hardware import GIB, Hardware
from toolkit.planning.idle import IdleGpus, idle_gpus
from toolkit.planning.plan import Plan, largest_micro_batch, make_plan, step_seconds
from toolkit.planning.recomputation import NeedlessRecomputation, needless_recomputation
from toolkit.planning.sizes import choices
from toolkit.planning.sizes.choices import Candidate, planned_choices
from toolkit.planning.sizes.first_epoch import FirstEpoch
from toolkit.planning.sizes.shapes import Lengths
from toolkit.planning.subject import Subject
from toolkit.planning.workload import Workload, from_maxima
from toolkit.recipe.batches import micro_batch_sizes
from toolkit.recipe.resolve import ResolvedRun, resolve
from toolkit.recipe.schema import Recipe
from toolkit.recipe.sections.model import Lora, Quantization
from toolkit.recipe.tree import Tree, value_at

OFFLOAD = "zero3_offload"  # what leaves least on a device
ALL = "all of them but offloading"  # of the changes
LEAST_GAIN = GIB / 100  # below, a change is no advice
CLOSE = 0.95  # of the best speed: the recipe's own JSON is kept within it


@dataclass(frozen=True)
class Row:
    """One DeepSpeed JSON.

    Attributes:
        name: of the JSON.
        conflicts: why it cannot be used with this recipe, in words; then there is no plan.
        plan: with the recipe's micro-batch; where that is ``auto``, with the one that a run would choose, or one clip.
        lacking: what the hardware has too little of, and how many bytes it lacks.
        max_micro_batch: the most clips of a forward pass that fit; 0 = not one.
        seconds: of a step, by the model of the hardware: with what is chosen, else with that micro-batch.
        config: the resolved JSON.
        choice: the micro-batches that a run with ``auto`` chooses; None where it has its number, or without a corpus.
        reason: why it chooses them, in words.
        recomputes: whether activations are recomputed; of ``auto`` what is faster among what fits.
    """

    name: str
    conflicts: str = ""
    plan: Plan | None = None
    lacking: Mapping[str, float] = field(default_factory=dict)
    max_micro_batch: int = 0
    seconds: float | None = None
    config: Tree | None = None
    choice: Candidate | None = None
    reason: str = ""
    recomputes: bool = False

    @property
    def clips(self) -> int:
        """Of the longest clips in a forward pass with what is chosen; without a choice the most that fit."""
        return self.choice.size if self.choice else self.max_micro_batch

    @property
    def fits(self) -> bool:
        """Whether the recipe's own micro-batch fits."""
        return self.plan is not None and not self.lacking

    @property
    def share(self) -> float:
        """What there is of what it needs, 0..1: of the resource of which most is lacking."""
        needs = self.plan.needs if self.plan else {}
        return min((1 - size / needs[name] for name, size in self.lacking.items()), default=1.0)

    @property
    def lacks(self) -> str:
        """What the hardware has too little of, in words."""
        return " and ".join(f"{size / GIB:.2f} GiB of {name}" for name, size in self.lacking.items())


@dataclass(frozen=True)
class Advice:
    """A change that saves memory.

    Attributes:
        change: what to do, in words.
        settings: as the command line takes them.
        gain: bytes that it saves, of what lacks most.
        fits: whether the run then fits.
    """

    change: str
    settings: str
    gain: float
    fits: bool

    @property
    def is_useful(self) -> bool:
        """Whether it saves what a table shows."""
        return self.fits or self.gain >= LEAST_GAIN


@dataclass(frozen=True)
class Comparison:
    """All rows of a recipe.

    Attributes:
        rows: one for each JSON.
        recommended: the name of one of them; None where nothing fits.
        reason: why that one.
        advice: what to change where nothing fits, what costs least first.
        idle: whether the global batch leaves the GPUs of the recommended one idle.
        recomputation: what the recommended one recomputes though there is room for it.
        batch: the arithmetic of a step in words.
    """

    rows: list[Row]
    recommended: Row | None
    reason: str
    advice: list[Advice]
    idle: IdleGpus | None = None
    recomputation: NeedlessRecomputation | None = None
    batch: str = ""

    def relative_speed(self, row: Row) -> float | None:
        """Of the fastest row, 0..1; None where it cannot run."""
        known = [other.seconds for other in self.rows if other.seconds is not None]
        return min(known) / row.seconds if row.seconds is not None else None

    @property
    def nearest(self) -> Row | None:
        """Where nothing fits, the row of whose needs the hardware has the largest share; None without any plan."""
        return max((row for row in self.rows if row.plan), key=lambda row: row.share, default=None)

    def nothing_fits(self, what: str, hardware: Hardware) -> UserError:
        """The error to raise where no JSON is recommended; ``what`` does not fit."""
        row, useful = self.nearest, [one for one in self.advice if one.is_useful]
        lacks = f": {row.name} lacks {row.lacks}" if row else ""
        enough = next((one for one in useful if one.fits), None)
        most = max(useful, key=lambda one: one.gain, default=None)
        larger = "take larger or more GPUs or nodes, or a smaller backbone"
        if enough:
            hint = f"{enough.change}: {enough.settings}"
        elif most:
            hint = f"{larger}; {most.change} ({most.settings}) saves {most.gain / GIB:.2f} GiB and is not enough"
        else:
            hint = larger
        return UserError(f"{what} fits on {hardware.in_words()}{lacks}", hint)


def compare(
    subject: Subject, runs: dict[str, ResolvedRun | UserError], hardware: Hardware, workload: Workload, own: str
) -> Comparison:
    """Plan a recipe under each JSON.

    Args:
        subject: the recipe's model.
        runs: by the JSON's name the resolved run, or why there is none.
        hardware: where it is to run.
        workload: its longest clips.
        own: the recipe's own JSON.
    """
    clips: dict[int, tuple[Lengths, FirstEpoch]] = {}
    rows = [
        Row(name, conflicts=f"{run.message} ({run.hint})")
        if isinstance(run, UserError)
        else _faster_row(name, subject, run, hardware, workload, clips)
        for name, run in runs.items()
    ]
    batch = next((run.batch for run in runs.values() if isinstance(run, ResolvedRun)), "")
    candidates = [row for row in rows if row.seconds is not None]
    plain = [row for row in candidates if not changes_results(row.config)] or candidates
    if not plain:
        nothing = Comparison(rows, None, "nothing fits", [], batch=batch)
        if nothing.nearest is None:
            return nothing
        run = runs[nothing.nearest.name]
        assert isinstance(run, ResolvedRun)
        run = run.recomputing(nothing.nearest.recomputes)
        return replace(nothing, advice=list(advice_for(run, hardware, workload)))
    best = min(plain, key=lambda row: row.seconds or 0.0)
    enough = (best.seconds or 0.0) / CLOSE
    chosen = next((row for row in plain if row.name == own and (row.seconds or 0.0) <= enough), best)
    reason = (
        "the recipe's own JSON fits, and no other is expected to be faster by more than 5 %"
        if chosen.name == own
        else "the fastest of those that fit, by the model of the hardware"
    )
    run = runs[chosen.name]
    assert isinstance(run, ResolvedRun)
    idle = idle_gpus(subject, run.recomputing(chosen.recomputes), hardware, workload, chosen.clips)
    recomputation = needless_recomputation(subject, run, hardware, workload, chosen.clips)
    return Comparison(rows, chosen, reason, [], idle, recomputation, batch)


def _faster_row(
    name: str,
    subject: Subject,
    run: ResolvedRun,
    hardware: Hardware,
    workload: Workload,
    clips: dict[int, tuple[Lengths, FirstEpoch]],
) -> Row:
    """With activations recomputed where only then it fits, or where it is faster."""
    kept, *others = (
        replace(_row(name, subject, run.recomputing(one), hardware, workload, clips), recomputes=one)
        for one in run.may_recompute
    )
    recomputed = others[0] if others else kept
    if recomputed.fits != kept.fits:
        return kept if kept.fits else recomputed
    if kept.seconds is None:
        return recomputed if kept.plan else kept
    return recomputed if choices.is_slower(kept.seconds, recomputed.seconds) else kept


def _row(
    name: str,
    subject: Subject,
    run: ResolvedRun,
    hardware: Hardware,
    workload: Workload,
    clips: dict[int, tuple[Lengths, FirstEpoch]],
) -> Row:
    try:
        largest = largest_micro_batch(subject, run, hardware, workload)
        fullest = make_plan(subject, run, hardware, workload, micro_batch_size=max(1, largest))
        own = run.recipe.training.micro_batch_size
        plan = fullest if own == "auto" else make_plan(subject, run, hardware, workload)
        planned = planned_choices(subject, run, hardware, workload, clips)
        candidates = planned.candidates() if planned and largest else []
    except UserError as error:
        return Row(name, conflicts=f"{error.message} ({error.hint})")
    seconds = None
    if largest:
        even = make_plan(subject, run, hardware, workload, micro_batch_size=_even(run, largest))
        seconds = step_seconds(even, run, hardware, subject.weights)
    row = Row(name, "", plan, plan.lacking(hardware), largest, seconds, run.deepspeed)
    if not planned or not candidates:
        return row
    choice = choices.fastest(candidates)
    plan, reason = planned.plan(choice.limits), choices.reason(choice, candidates)
    return replace(row, plan=plan, seconds=choice.seconds, choice=choice, reason=reason)


def _even(run: ResolvedRun, largest: int) -> int:
    """Clips of the micro-batches into which a step is divided where at most so many fit."""
    training, copies = run.recipe.training, run.data_parallel_size
    return micro_batch_sizes(training.global_batch_size, copies, largest)[1]


def changes_results(config: Tree | None) -> bool:
    """Whether a JSON rounds more than bf16 training does, or compiles: chosen by people, never recommended first."""
    keys = ("bf16.bf16_master_weights_and_grads", "fp16.enabled", "compile.deepcompile")
    return any(value_at(config or {}, key) for key in keys)


def advice_for(run: ResolvedRun, hardware: Hardware, workload: Workload, phase: str | None = None) -> Iterator[Advice]:
    """What each change would save under the run's JSON, and all of them together; each takes about a second.

    Args:
        run: its micro-batches are those of its recipe.
        hardware: where it runs.
        workload: its longest clips.
        phase: of the plan, in which a GPU's memory is to be saved; None = in any, or what the hardware has too little
            of instead: a node's memory or disk.
    """
    subject = Subject.of(run.recipe)
    before = make_plan(subject, run, hardware, workload, micro_batch_size=_least(run.recipe))
    of = next(iter(before.lacking(hardware)), "GPU memory")
    changes = _changes(run)
    together: dict[str, dict[str, Any]] = {}
    for _, _, updates, _ in changes:
        for section, values in updates.items():
            together[section] = together.get(section, {}) | values
    words = " ".join(words for _, words, updates, _ in changes if updates)
    words = " ".join(dict.fromkeys(words.split()))  # quantisation names LoRA again
    for change, settings, updates, ds in [*changes, (ALL, words, together, "")]:
        plan = _changed(subject, run, hardware, workload, updates, ds)
        if plan:
            gain = before.phases[phase] - plan.phases[phase] if phase else before.needs[of] - plan.needs[of]
            yield Advice(change, settings, gain, not plan.lacking(hardware))


def _changes(run: ResolvedRun) -> list[tuple[str, str, dict[str, dict[str, Any]], str]]:
    """What may save memory: in words, as settings, as sections of the recipe, and another DeepSpeed JSON if any."""
    recipe = run.recipe
    changes: list[tuple[str, str, dict[str, dict[str, Any]], str]] = []
    if not run.recomputes:
        recompute = {"training": {"gradient_checkpointing": True}}
        changes.append(("recompute activations", "training.gradient_checkpointing=true", recompute, ""))
    if recipe.training.micro_batch_size not in (1, "auto"):
        one = {"training": {"micro_batch_size": 1}}
        changes.append(("one clip in a forward pass", "training.micro_batch_size=1", one, ""))
    if recipe.evaluation.batch_frames != "auto" and recipe.evaluation.batch_frames > recipe.data.max_frames:
        setting = f"evaluation.batch_frames={recipe.data.max_frames}"
        one = {"evaluation": {"batch_frames": recipe.data.max_frames}}
        changes.append(("one long clip in a generation batch", setting, one, ""))
    lora = recipe.model.lora or Lora()
    if recipe.model.lora is None:
        changes.append(("train LoRA adapters alone", "model.lora.r=16", {"model": {"lora": lora, "freeze": []}}, ""))
    if recipe.model.quantization is None:
        words = "model.quantization=nf4" + ("" if recipe.model.lora else " model.lora.r=16")
        packed = {"model": {"lora": lora, "freeze": [], "quantization": Quantization(kind="nf4")}}
        changes.append(("hold the frozen weights in NF4", words, packed, ""))
    if value_at(run.deepspeed, "zero_optimization.offload_param.device") in (None, "none"):
        changes.append((f"offload weights and states to the host ({OFFLOAD})", f"--ds {OFFLOAD}", {}, OFFLOAD))
    return changes


def _changed(
    subject: Subject,
    run: ResolvedRun,
    hardware: Hardware,
    workload: Workload,
    updates: dict[str, dict[str, Any]],
    ds: str,
) -> Plan | None:
    """The plan of a run with changes; None where they cannot be made."""
    sections = {name: getattr(run.recipe, name).model_copy(update=values) for name, values in updates.items()}
    recipe = run.recipe.model_copy(update=sections | {"deepspeed": ds or run.recipe.deepspeed})
    if "evaluation" in updates or workload.steps_per_epoch is None:
        workload = replace(workload, evaluated=from_maxima(recipe).evaluated)
    try:
        resolved = resolve(recipe, run.world_size, has_gpu=True, needs_data=False)
        # Changes that are not about the model find its traced passes again.
        subject = Subject.of(recipe) if "model" in updates else subject
        return make_plan(subject, resolved, hardware, workload, micro_batch_size=_least(recipe))
    except UserError:
        return None


def _least(recipe: Recipe) -> int | None:
    """Clips of a micro-batch that must fit: one where they are chosen; None = those that the recipe gives."""
    return 1 if recipe.training.micro_batch_size == "auto" else None
