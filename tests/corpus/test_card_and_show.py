import pytest
from PIL import Image

from toolkit.corpus.archives.files import open_poses
from toolkit.corpus.card import write_card
from toolkit.corpus.packed import Corpus
from toolkit.corpus.prepare import prepare
from toolkit.corpus.show import animate, find_clip
from toolkit.errors import UserError
from toolkit.recipe.schema import Data


@pytest.fixture
def corpus(own_clips, tmp_path) -> Corpus:
    (own_clips / "poses" / "train-00000.pose").write_bytes(b"not a pose")
    table = own_clips / "table.csv"
    table.write_text(table.read_text() + "again,मौसम $x^2,train,ase\n")
    (own_clips / "poses" / "again.pose").write_bytes((own_clips / "poses" / "train-00001.pose").read_bytes())
    settings = {"workers": 1, "max_rejects": 0.1, "landmarks": "youtube_asl_85", "fps": 1}
    data = Data(table=str(table), poses=str(own_clips / "poses"), **settings)
    return Corpus.open(prepare(data, tmp_path / "corpus").path)


def test_the_card_states_contents_and_defects(corpus: Corpus) -> None:
    text = (corpus.path / "README.md").read_text()
    assert "24 clips" in text and "| train | 16 |" in text
    assert "youtube_asl_85, 85 points (body 6, left_hand 21, right_hand 21, face 37)" in text
    assert "- rejects: 1\n" in text and "- not a .pose file, or of an unknown version: 1" in text
    assert "- Landmarks that files lack: 37, for instance FACE_LANDMARKS/0." in text
    with Image.open(corpus.path / "card.png") as picture:
        assert picture.width > 1000


def test_the_card_is_the_same_every_time(corpus: Corpus) -> None:
    before = [(corpus.path / name).read_bytes() for name in ("README.md", "card.png")]
    write_card(corpus)
    assert before == [(corpus.path / name).read_bytes() for name in ("README.md", "card.png")]


@pytest.mark.parametrize("beside", [False, True])
def test_a_clip_is_drawn_frame_by_frame(corpus: Corpus, own_clips, tmp_path, beside: bool) -> None:
    poses = open_poses(own_clips / "poses") if beside else None
    uids = list(corpus.splits["dev"].uids)
    shortest = min(uids, key=lambda uid: corpus.splits["dev"].frames[uids.index(uid)])
    animate(corpus, shortest, tmp_path / "clip.gif", poses)
    with Image.open(tmp_path / "clip.gif") as picture:
        assert picture.n_frames == corpus.splits["dev"].frames.min()
        assert picture.width == (640 if beside else 320)


def test_a_clip_that_is_not_there(corpus: Corpus, own_clips, tmp_path) -> None:
    with pytest.raises(UserError, match="'train-00000'"):
        animate(corpus, "train-00000", tmp_path / "clip.gif")
    (own_clips / "poses" / "again.pose").unlink()
    with pytest.raises(UserError, match="recording of 'again'"):
        animate(corpus, "again", tmp_path / "clip.gif", open_poses(own_clips / "poses"))


def test_a_clip_is_found_by_any_spelling_of_its_uid(corpus: Corpus) -> None:
    uid = corpus.splits["dev"].uids[0]
    assert {find_clip(corpus, name)[1].uid for name in (uid, f"{uid}.POSE", f"/data/poses/{uid}.pose")} == {uid}
    with pytest.raises(UserError, match=f"'{uid}_'") as raised:
        find_clip(corpus, f"{uid}_")
    assert f"'{uid}'" in raised.value.hint
