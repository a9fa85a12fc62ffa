"""FLOPs and kernels of a pass over any micro-batch of a run, from few traced ones."""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.planning.costs.tracing import Trace
from toolkit.planning.subject import Subject
from toolkit.planning.workload import Passes
from toolkit.recipe.tree import Tree

CLIPS = 2  # of a traced pass: FLOPs are in proportion to clips, and kernels do not depend on them
SHORT = 4  # times shorter than the longest clips and texts are those of the other traced passes


@dataclass(frozen=True)
class PassCost:
    """FLOPs for each clip are on the surface through four passes: all but a few per cent are linear in both lengths.

    Attributes:
        frames, tokens: short and long, of the traced passes.
        flops: of a clip, by frames and tokens.
        kernels: of the longest pass.
    """

    frames: tuple[int, int]
    tokens: tuple[int, int]
    flops: tuple[tuple[float, float], tuple[float, float]]
    kernels: float

    @classmethod
    def of(cls, subject: Subject, config: Tree, longest: Passes, checkpointing: bool) -> PassCost:
        """Trace a model under a DeepSpeed JSON.

        Args:
            subject: the model.
            config: the resolved JSON.
            longest: clips, which do not count, frames and tokens of the longest micro-batch.
            checkpointing: whether activations are recomputed.

        Raises:
            UserError: the model cannot be traced.
        """
        frames, tokens = ((max(1, length // SHORT), max(2, length)) for length in longest[1:])
        traces = [[subject.traced(CLIPS, f, t, config, checkpointing) for t in tokens] for f in frames]
        short, long = ((row[0].flops / CLIPS, row[1].flops / CLIPS) for row in traces)
        return cls(frames, tokens, (short, long), traces[1][1].kernels)

    def trace(self, passes: Passes) -> Trace:
        """A pass over a micro-batch of so many clips, frames and tokens; its memory is not known."""
        clips, *lengths = passes
        along_frames, along_tokens = (
            (length - short) / (long - short)
            for length, (short, long) in zip(lengths, (self.frames, self.tokens), strict=True)
        )
        few, many = (low + along_tokens * (high - low) for low, high in self.flops)
        flops = clips * max(0.0, few + along_frames * (many - few))
        return Trace(saved=0.0, peaks={}, kernels=self.kernels, flops=flops)
