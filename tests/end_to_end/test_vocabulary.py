"""A run with a trimmed vocabulary on two ranks: stopped, resumed, evaluated, exported, and its vocabulary restored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from tests.scripts import run_main
from toolkit.corpus.packed import Corpus
from toolkit.models.loading.load import load_translator
from toolkit.models.tokenizers import train_tokenizer
from toolkit.models.vocabulary.trimming import trimming_of

# Words that the clips' texts, letters of alphabets, have not got.
OTHERS = ["vocabulary", "of", "many", "other", "words", "none", "is", "spelled", "here", "twice"]


def test_a_run_with_a_trimmed_vocabulary(
    fork: Callable[..., Any], train_here: Callable[..., Any], settings: list[str], clips: Path, tmp_path: Path
) -> None:
    rows = (clips / "table.csv").read_text().splitlines()
    tokenizer = train_tokenizer([row.split(",")[1] for row in rows] + OTHERS * 20)
    tokenizer.save_pretrained(tmp_path / "full")
    run_dir = tmp_path / "trimmed"
    arguments = [
        *("--recipe", "t5_small", "--ds", "zero3", *settings, f"model.tokenizer={tmp_path / 'full'}"),
        *("model.vocabulary=corpus", "model.prefix=null", "training.epochs=1", "evaluation.num_beams=1"),
        *("training.ctc_weight=0.1", f"run.dir={run_dir}"),
    ]
    bad = [*arguments, f"model.vocabulary_text={tmp_path / 'none.txt'}"]
    refused = train_here(*bad)
    assert refused.code == 2 and len(refused.err.strip().splitlines()) == 2 and "none.txt" in refused.err
    refused = train_here(*arguments, "model.tokenizer=bytes")
    assert refused.code == 2 and "model.vocabulary=corpus" in refused.err

    first = fork("launch/train.py", *arguments, "training.time_limit=0.0001", ranks=2)
    assert first.code == 75, first.out + first.err
    kept = AutoTokenizer.from_pretrained(run_dir / "processor")
    trimming = trimming_of(kept)
    assert trimming and len(kept) < len(tokenizer)
    other = train_here(*[word for word in arguments if word != "model.vocabulary=corpus"])
    assert other.code == 2 and "model.vocabulary" in other.err

    rest = fork("launch/train.py", *arguments, "training.time_limit=9", "--json", ranks=2)
    assert rest.code == 0, rest.out + rest.err
    assert "resuming from" in rest.out
    cache = next(Path(word.removeprefix("data.cache=")) for word in settings if word.startswith("data.cache="))
    places = [path.parent for path in cache.glob("*/corpus.json")]
    texts = [text for place in places for text in Corpus.open(place).splits["train"].texts]
    assert texts
    for text in texts:
        ids = kept(text_target=text)["input_ids"]
        assert [trimming.kept[place] for place in ids] == tokenizer(text_target=text)["input_ids"]

    results = {}
    for name, options in {"small": [], "whole": ["--restore-vocabulary"]}.items():
        done = run_main("launch/export.py", run_dir, "--to", tmp_path / name, *options, "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        results[name] = json.loads(done.stdout.splitlines()[-1])
        model, processor = load_translator(tmp_path / name)
        size = len(kept) if name == "small" else len(tokenizer)
        assert len(processor.tokenizer) == model.backbone.config.vocab_size == size
        card = (tmp_path / name / "README.md").read_text()
        assert trimming.in_words() in card
        total = sum(parameter.numel() for parameter in model.parameters())
        assert f"{total / 1e6:,.1f} M parameters" in card
    assert results["whole"]["restored_tokens"] == len(tokenizer) - len(kept)
    refused = run_main("launch/export.py", tmp_path / "small", "--to", tmp_path / "x", cwd=tmp_path)
    assert refused.returncode == 2
