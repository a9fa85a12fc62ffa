"""The processor of a run, the same on all ranks."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path

from toolkit.cluster.ranks import Ranks
from toolkit.cluster.rendezvous import on_rank_0
from toolkit.corpus.packed import Corpus
from toolkit.models import PoseProcessor
from toolkit.models.build import build_processor
from toolkit.recipe.resolve import ResolvedRun

PROCESSOR = "processor"  # folder in the run directory


def shared_processor(resolved: ResolvedRun, ranks: Ranks, corpus: Corpus) -> PoseProcessor:
    """The run's processor, made by rank 0: a tokenizer trained twice need not come out the same. All ranks call this.

    Its files come to the others from rank 0, because a shared file system shows them when it likes.
    """
    folder = resolved.run_dir / PROCESSOR

    def make() -> dict[str, bytes]:
        if not folder.exists():
            partial = folder.with_name(".processor.partial")
            build_processor(resolved.recipe, corpus).save_pretrained(partial)
            partial.rename(folder)
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    files = on_rank_0(make)
    with nullcontext(folder) if ranks.is_main else tempfile.TemporaryDirectory() as place:
        for name, content in () if ranks.is_main else files.items():
            copy = Path(place, name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(content)
        return PoseProcessor.from_pretrained(place)
