"""The printed table and samples."""

from toolkit.scoring.floors import floors
from toolkit.scoring.metrics import score
from toolkit.scoring.predictions import Prediction
from toolkit.scoring.table import choose_samples, samples_text, scores_table


def test_scores_stand_in_columns_beside_their_floors():
    references = ["hello world", "good night"]
    rows = {"test": score(["hello word", "good night"], references)}
    rows |= {f"floor: {name}": scores for name, scores in floors(["good night"], references).items()}
    table = scores_table(rows)
    lines = table.splitlines()
    assert lines[0].split() == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "chrF++", "ROUGE-L", "WER", "CER", "clips"]
    assert len({len(line) for line in lines[:5]}) == 1
    chrf = f"{rows['test'].chrf:.2f}"
    assert lines[2].split() == ["test", "75.00", "61.24", "n/a", "n/a", chrf, "75.00", "0.2500", "0.0476", "2"]
    assert lines[3].startswith("floor: constant") and lines[4].startswith("floor: random")
    # The signature is printed once, since all rows share it.
    assert sum(line.startswith("bleu: nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:") for line in lines) == 1
    assert not any(line.endswith(" ") for line in lines)


def test_rows_with_other_settings_bring_their_own_signature():
    table = scores_table({"a": score(["x"], ["x"]), "b": score(["x"], ["x"], tokenize="char")})
    assert "tok:13a" in table and "tok:char" in table


def test_samples_are_the_same_for_the_same_seed_and_keep_their_order():
    predictions = [Prediction(f"u{index:02d}", "r", "h") for index in range(30)]
    chosen = choose_samples(predictions, 10, seed=1)
    assert chosen == choose_samples(predictions, 10, seed=1) != choose_samples(predictions, 10, seed=2)
    assert chosen == sorted(chosen, key=lambda item: item.uid) and len(set(chosen)) == 10
    assert choose_samples(predictions[:3], 10) == predictions[:3]


def test_a_sample_stays_on_its_lines_and_off_the_terminals_controls():
    text = samples_text([Prediction("u1", "two\nlines", "\x1b[31mred"), Prediction("u2", "हैं", "我")])
    assert text == ("u1\n  reference   two lines\n  hypothesis   [31mred\n\nu2\n  reference   हैं\n  hypothesis  我")
