"""Make the demo corpus: words fingerspelled by joining real recordings of single letters.

The letters are the fingerspelling lexicon in the PyPI wheel ``spoken-to-signed`` (MIT licence): one signer and one clip
per letter and language. Joined with transitions, pauses between words and seeded variation they become ``.pose`` files
and a table, which are prepared like any other corpus. The demo shows that the pipeline learns, and nothing about new
signers. No word is shared by train, dev and test.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import multiprocessing
import shutil
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from toolkit.errors import UserError
from toolkit.poses.features import interpolate_frames
from toolkit.poses.pose_file import FloatArray, read_pose

DEMO_VERSION = 1  # raise it when the same seed gives other clips
FPS = 25.0
MAIN_LANGUAGE = "ase"  # American Sign Language; `fsl` in the lexicon's index shows the very same clips
OTHER_LANGUAGES = ("asq", "bzs", "eso", "mfs", "sgg", "svk")
UNSEEN_LANGUAGES = ("gsg", "psr", "ssp", "swl")
MAIN_SHARE = 0.5  # share of training phrases in the main language
DEV_WORDS, TEST_WORDS = 0.05, 0.10  # shares of the word list
MOST_WORDS = 3  # in a phrase

SPEED, AMPLITUDE, NOISE = 0.3, 0.1, 0.02  # +-30 %, +-10 %, shoulder widths
HAND_OFFSET, CAMERA_OFFSET, CAMERA_SCALE = 0.05, 0.2, 0.1  # shoulder widths, shoulder widths, +-10 %
TRANSITION_FRAMES, PAUSE_FRAMES, PAUSE_DRIFT = (1, 4), (6, 10), 0.03

COMPONENTS = {"POSE_LANDMARKS": 33, "LEFT_HAND_LANDMARKS": 21, "RIGHT_HAND_LANDMARKS": 21}
_LEFT_SHOULDER, _RIGHT_SHOULDER = 11, 12
_INSTALL = "pip install --no-deps spoken-to-signed==0.4.0"
# How far each point follows its arm: wrist, fingers and hand by all of the offset, the elbow by half.
_ARMS = {
    "left": {13: 0.5, **dict.fromkeys((15, 17, 19, 21, *range(33, 54)), 1.0)},
    "right": {14: 0.5, **dict.fromkeys((16, 18, 20, 22, *range(54, 75)), 1.0)},
}


@dataclass(frozen=True)
class DemoSizes:
    """Phrases in each split of the demo corpus."""

    train: int = 4000
    dev: int = 100
    test: int = 320
    test_unseen_languages: int = 160


@dataclass(frozen=True)
class Phrase:
    """One clip to be made."""

    uid: str
    text: str
    split: str
    language: str


@dataclass(frozen=True)
class Letter:
    """The recording of one letter: pixels float32 [frames, 75, 3] and confidence float32 [frames, 75]."""

    values: FloatArray
    confidence: FloatArray
    fps: float


def words() -> list[str]:
    """The project's own list of English words, two to eight letters a-z each, sorted."""
    return (Path(__file__).parent / "words.txt").read_text(encoding="ascii").split()


def split_words(seed: int) -> dict[str, list[str]]:
    """Split the word list into train, dev and test; no word is in two of them."""
    shuffled = np.random.default_rng([seed, 0]).permutation(words()).tolist()
    num_dev, num_test = int(len(shuffled) * DEV_WORDS), int(len(shuffled) * TEST_WORDS)
    return {
        "dev": shuffled[:num_dev],
        "test": shuffled[num_dev : num_dev + num_test],
        "train": shuffled[num_dev + num_test :],
    }


def phrases(sizes: DemoSizes, seed: int) -> list[Phrase]:
    """The texts, splits and languages of a demo corpus: the same for the same seed."""
    vocabulary = split_words(seed)
    plans = [
        ("train", "train", sizes.train, (MAIN_LANGUAGE, *OTHER_LANGUAGES)),
        ("dev", "dev", sizes.dev, (MAIN_LANGUAGE,)),
        ("test", "test", sizes.test, (MAIN_LANGUAGE,)),
        ("test_unseen_languages", "test", sizes.test_unseen_languages, UNSEEN_LANGUAGES),
    ]
    made = []
    for number, (split, word_list, count, languages) in enumerate(plans):
        rng = np.random.default_rng([seed, 1, number])
        shares = np.full(len(languages), 1 / len(languages))
        if split == "train":
            shares = np.array([MAIN_SHARE, *[(1 - MAIN_SHARE) / len(OTHER_LANGUAGES)] * len(OTHER_LANGUAGES)])
        for index in range(count):
            chosen = rng.choice(vocabulary[word_list], size=rng.integers(1, MOST_WORDS + 1), replace=False)
            made.append(Phrase(f"{split}-{index:05d}", " ".join(chosen), split, str(rng.choice(languages, p=shares))))
    return made


def make_demo(
    folder: Path,
    sizes: DemoSizes = DemoSizes(),
    *,
    seed: int = 0,
    workers: int = 1,
    progress: Callable[[int], None] = lambda clips: None,
) -> Path:
    """Write ``table.csv`` (uid, text, split, language) and ``poses/{uid}.pose`` into ``folder``.

    The same sizes and seed give the same bytes, whatever the number of workers. ``progress`` is called with the number
    of clips made since its last call. The folder appears under its name only when it is complete.

    Raises:
        UserError: the lexicon is not installed or not complete.
    """
    lexicon = find_lexicon()
    todo = phrases(sizes, seed)
    for language in sorted({phrase.language for phrase in todo}):
        load_letters(lexicon, language)  # raises before any clip is made; forked workers inherit the letters
    unfinished = folder.with_name(folder.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "poses").mkdir(parents=True)
    make = partial(_write_clip, lexicon, unfinished / "poses", seed)
    if workers > 1:
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            for _ in pool.imap_unordered(make, todo, chunksize=32):
                progress(1)
    else:
        for phrase in todo:
            make(phrase)
            progress(1)
    with open(unfinished / "table.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["uid", "text", "split", "language"])
        rows.writerows((phrase.uid, phrase.text, phrase.split, phrase.language) for phrase in todo)
    unfinished.rename(folder)
    return folder


def find_lexicon() -> Path:
    """The folder of the letters in the installed wheel; the package itself, which needs many others, is not imported.

    Raises:
        UserError: it is not installed.
    """
    spec = importlib.util.find_spec("spoken_to_signed")
    for location in (spec.submodule_search_locations or []) if spec else []:
        lexicon = Path(location) / "assets" / "fingerspelling_lexicon"
        if (lexicon / "index.csv").is_file():
            return lexicon
    raise UserError("the demo corpus needs the package spoken-to-signed, which is not installed", _INSTALL)


@lru_cache(maxsize=32)
def load_letters(lexicon: Path, language: str) -> dict[str, Letter]:
    """The letters a-z of one sign language.

    Raises:
        UserError: one of them is missing.
    """
    letters: dict[str, Letter] = {}
    with open(lexicon / "index.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            label = row["words"].lower()
            if row["signed_language"] == language and len(label) == 1 and label in string.ascii_lowercase:
                letters.setdefault(label, _load_letter(lexicon / row["path"]))
    missing = sorted(set(string.ascii_lowercase) - set(letters))
    if missing:
        raise UserError(f"the fingerspelling lexicon lacks the letters {''.join(missing)} of '{language}'", _INSTALL)
    return letters


def _load_letter(path: Path) -> Letter:
    pose = read_pose(path.read_bytes())
    columns = [index for index, (component, _) in enumerate(pose.header.points) if component in COMPONENTS]
    return Letter(pose.data[:, 0, columns], pose.confidence[:, 0, columns], pose.fps)


def synthesise(phrase: Phrase, letters: dict[str, Letter], seed: int) -> tuple[FloatArray, FloatArray]:
    """Join the letters of a phrase.

    Returns:
        pixels float32 [frames, 75, 3] and confidence float32 [frames, 75]; missing landmarks are 0 in both.
    """
    rng = np.random.default_rng([seed, 2, *phrase.uid.encode()])
    segments: list[tuple[FloatArray, FloatArray]] = []
    for character in phrase.text:
        if character == " ":
            segments.append(_pause(*segments[-1], rng))
            continue
        letter = _vary(letters[character], rng)
        if segments:
            segments.append(_transition(segments[-1], letter, rng))
        segments.append(letter)
    values = np.concatenate([segment for segment, _ in segments])
    confidence = np.concatenate([segment for _, segment in segments])

    width = _shoulder_width(values)
    # The depth of these files is in widths of their 500-pixel picture, so its noise must be in widths, too.
    noise = rng.normal(0, NOISE * width, values.shape) * [1, 1, 1 / 500]
    middle = values[:, [_LEFT_SHOULDER, _RIGHT_SHOULDER], :2].mean(axis=(0, 1))
    camera = middle + rng.uniform(-CAMERA_OFFSET, CAMERA_OFFSET, 2) * width
    values = values + noise
    values[..., :2] = (values[..., :2] - middle) * rng.uniform(1 - CAMERA_SCALE, 1 + CAMERA_SCALE) + camera
    missing = confidence == 0
    values[missing] = 0.0
    return values.astype(np.float32), confidence


def _vary(letter: Letter, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """One letter with another speed and amplitude, and its hands moved a little."""
    step = letter.fps / FPS * rng.uniform(1 - SPEED, 1 + SPEED)
    positions = np.arange(0, len(letter.values) - 1 + 1e-9, step)
    with_confidence = np.concatenate([letter.values, letter.confidence[..., None]], axis=2)
    sampled, visible = interpolate_frames(with_confidence, letter.confidence > 0, positions)
    values, confidence = sampled[..., :3], np.where(visible, sampled[..., 3], 0.0)
    shown = np.maximum(visible.sum(axis=0), 1)[:, None]
    middle = (values * visible[..., None]).sum(axis=0) / shown
    values = middle + (values - middle) * rng.uniform(1 - AMPLITUDE, 1 + AMPLITUDE)
    offset = rng.normal(0, HAND_OFFSET * _shoulder_width(values), (2, 2))
    return _move_arms(values, offset[:, None]), confidence.astype(np.float32)


def _transition(
    before: tuple[FloatArray, FloatArray], after: tuple[FloatArray, FloatArray], rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """A few frames between two letters; a landmark that is missing on either side is missing in all of them."""
    count = rng.integers(TRANSITION_FRAMES[0], TRANSITION_FRAMES[1] + 1)
    share = (np.arange(1, count + 1) / (count + 1))[:, None]
    confidence = np.minimum(before[1][-1], after[1][0])[None].repeat(count, axis=0)
    return before[0][-1] * (1 - share[..., None]) + after[0][0] * share[..., None], confidence


def _pause(values: FloatArray, confidence: FloatArray, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """A space: the last frame of a word, held and slowly drifting."""
    count = rng.integers(PAUSE_FRAMES[0], PAUSE_FRAMES[1] + 1)
    drift = rng.normal(0, PAUSE_DRIFT * _shoulder_width(values), (2, 1, 2)) * np.linspace(0, 1, count)[:, None]
    return _move_arms(values[-1:].repeat(count, axis=0), drift), confidence[-1:].repeat(count, axis=0)


def _move_arms(values: FloatArray, offsets: npt.NDArray[np.float64]) -> FloatArray:
    """Shift the left and the right arm in the picture by ``offsets`` [2, frames or 1, 2]."""
    moved = values.copy()
    for arm, offset in zip(_ARMS.values(), offsets, strict=True):
        moved[:, list(arm), :2] += offset[:, None] * np.array(list(arm.values()))[:, None]
    return moved


def _shoulder_width(values: FloatArray) -> float:
    return float(np.median(np.hypot(*(values[:, _LEFT_SHOULDER] - values[:, _RIGHT_SHOULDER])[:, :2].T)))


@lru_cache(maxsize=1)
def _header(lexicon: Path) -> bytes:
    """The header of the clips, with three components of the lexicon's files, as pose-format writes it."""
    from pose_format import Pose
    from pose_format.pose_header import PoseHeader

    with open(lexicon / "index.csv", newline="", encoding="utf-8") as file:
        example = lexicon / next(csv.DictReader(file))["path"]
    header = Pose.read(example.read_bytes()).header
    kept = [component for component in header.components if component.name in COMPONENTS]
    buffer = io.BytesIO()
    PoseHeader(0.2, header.dimensions, kept).write(buffer)
    return buffer.getvalue()


def _write_clip(lexicon: Path, folder: Path, seed: int, phrase: Phrase) -> None:
    from pose_format.numpy import NumPyPoseBody

    values, confidence = synthesise(phrase, load_letters(lexicon, phrase.language), seed)
    buffer = io.BytesIO()
    buffer.write(_header(lexicon))
    NumPyPoseBody(FPS, values[:, None], confidence[:, None]).write(0.2, buffer)
    (folder / f"{phrase.uid}.pose").write_bytes(buffer.getvalue())
