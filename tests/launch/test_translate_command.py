"""launch/translate.py as its user meets it: what it prints, what it leaves, and its exit codes."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.time_limits import limit
from toolkit.errors import EXIT_OUT_OF_MEMORY
from toolkit.poses.pose_file import read_pose

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "translate.py"
Clips = list[Path]

# What translating one clip has no use for; each would cost its user a part of a second, or seconds.
HEAVY = {
    *("deepspeed", "datasets", "pyarrow", "pandas", "sacrebleu", "jiwer", "pydantic", "peft", "bitsandbytes", "wandb"),
    *("tensorboard", "matplotlib", "scipy", "sklearn", "rich", "mediapipe", "cv2"),
}


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture
def translate(command, monkeypatch, capsys, model_folder) -> Callable[..., Done]:
    """Runs the command in this process."""
    main = command("translate").main

    def run(*arguments: Any, model: Path | str = model_folder) -> Done:
        monkeypatch.setattr(sys, "argv", ["translate.py", "--model", str(model), *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        return Done(int(left.value.code or 0), *capsys.readouterr())

    return run


def test_too_little_memory_is_an_error_and_a_hint(translate, clip_files: Clips, monkeypatch) -> None:
    def search(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("toolkit.inference.translate_files.search", search)
    done = translate(clip_files[0])
    assert done.code == EXIT_OUT_OF_MEMORY
    assert re.fullmatch(r"error: .*2\.00 GiB\nhint: .*--num-beams.*\n", done.err)


def test_a_fresh_process_imports_nothing_that_it_does_not_need(model_folder: Path, clip_files: Clips, tmp_path) -> None:
    code = (
        "import runpy, sys\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print(*sorted({name.partition('.')[0] for name in sys.modules}), file=open('modules', 'w'))\n"
    )
    arguments = [str(SCRIPT), "--model", str(model_folder), str(clip_files[0]), "--window", "0"]
    program = f"import sys; sys.argv = {arguments!r}\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=limit(120)
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"[a-z]{8}\n", done.stdout)
    imported = set((tmp_path / "modules").read_text().split())
    assert "torch" in imported and not imported & HEAVY


def test_a_file_whose_name_begins_with_hyphens_is_no_option(
    translate, clip_files: Clips, tmp_path, monkeypatch
) -> None:
    """The shell's `*.pose` gives such names of YouTube's videos as they are."""
    shutil.copy(clip_files[0], tmp_path / "--7E2sU6zP4.pose")
    monkeypatch.chdir(tmp_path)
    done = translate("--7E2sU6zP4.pose", "--window", "0")
    assert (done.code, done.err) == (0, "") and done.out == translate(clip_files[0], "--window", "0").out


def test_folders_archives_members_and_pipes_give_the_same_texts(
    translate, clip_files: Clips, tmp_path, monkeypatch
) -> None:
    folder = tmp_path / "clips" / "nested"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "clips.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in clip_files:
            shutil.copy(file, folder)
            archive.write(file, f"nested/{file.name}")
    listed = translate(*clip_files, "--window", 0)
    assert listed.code == 0 and listed.err == ""
    texts = dict(line.split("\t") for line in listed.out.splitlines())
    assert list(texts) == [file.stem for file in clip_files]
    expected = "".join(f"nested/{uid}\t{text}\n" for uid, text in texts.items())
    for place in (tmp_path / "clips", tmp_path / "clips.zip"):
        assert translate(place, "--window", 0).out == expected
    one = clip_files[2]
    for member in (f"nested/{one.name}", f"nested/{one.stem}"):
        assert translate(f"{tmp_path / 'clips.zip'}:{member}", "--window", 0).out == f"{texts[one.stem]}\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(one.read_bytes())))
    assert translate("-", "--window", 0).out == f"{texts[one.stem]}\n"


def test_clips_of_one_name_are_listed_by_their_paths(translate, clip_files: Clips, tmp_path) -> None:
    twins = [tmp_path / side / "clip.pose" for side in "ab"]
    for twin in twins:
        twin.parent.mkdir()
        shutil.copy(clip_files[0], twin)
    assert [line.split("\t")[0] for line in translate(*twins, "--window", 0).out.splitlines()] == list(map(str, twins))


def test_a_run_directory_stands_for_its_best_model(translate, model_folder: Path, clip_files: Clips, tmp_path) -> None:
    shutil.copytree(model_folder, tmp_path / "run" / "best")
    assert translate(clip_files[0], model=tmp_path / "run").out == translate(clip_files[0]).out


def test_the_one_spoiled_clip_of_many_is_named_and_the_others_are_translated(
    translate, clip_files: Clips, tmp_path
) -> None:
    for number in range(100):
        (tmp_path / f"{number:03d}.pose").symlink_to(clip_files[number % len(clip_files)])
    spoiled = tmp_path / "042.pose"
    spoiled.unlink()
    spoiled.write_bytes(clip_files[0].read_bytes()[:5000])
    done = translate(tmp_path, "--window", 0)
    assert done.code == 0
    assert [line.split("\t")[0] for line in done.out.splitlines()] == [f"{n:03d}" for n in range(100) if n != 42]
    assert done.err == f"rejected: {spoiled}: the file is truncated\n"

    done = translate(tmp_path, "--window", 0, "--max-rejects", 0.001, "--json")
    assert done.code == 3
    assert len(done.json["translations"]) == 99
    assert done.json["rejects"] == [{"uid": "042", "source": str(spoiled), "reason": "the file is truncated"}]
    assert "1 of 100 clips" in done.err and "--max-rejects 0.01" in done.err.splitlines()[-1]


def test_fps_overrules_the_rate_of_a_file(translate, clip_files: Clips, tmp_path) -> None:
    raw = read_pose(clip_files[0].read_bytes())
    whole = bytearray(clip_files[0].read_bytes())
    # The rate, and the numbers of frames and people, stand before the body.
    struct.pack_into("<f", whole, len(whole) - raw.data.nbytes - raw.confidence.nbytes - 10, 1000.0)
    (tmp_path / "clip.pose").write_bytes(whole)
    done = translate(tmp_path / "clip.pose", "--window", 0)
    assert (done.code, done.out) == (2, "") and "--fps" in done.err
    done = translate(tmp_path / "clip.pose", "--window", 0, "--n-best", 1, "--fps", raw.fps)
    assert done.code == 0 and done.out == translate(clip_files[0], "--window", 0, "--n-best", 1).out


def test_n_best_with_scores(translate, clip_files: Clips) -> None:
    done = translate(clip_files[0], "--n-best", 3, "--window", 0, "--json")
    found = done.json["translations"][0]["windows"][0]["n_best"]
    scores = [item["score"] for item in found]
    assert len(found) == 3 and scores == sorted(scores, reverse=True)
    lines = translate(clip_files[0], "--n-best", 3, "--window", 0).out.splitlines()
    assert [float(line.split("\t")[0]) for line in lines] == pytest.approx(scores, abs=1e-3)
    greedy = translate(clip_files[0], "--num-beams", 1, "--window", 0, "--json").json
    assert greedy["translations"][0]["windows"][0]["n_best"][0]["score"] is None


def test_a_long_recording_becomes_subtitles(translate, clip_files: Clips, tmp_path) -> None:
    longest = max(clip_files, key=lambda file: file.stat().st_size)
    srt, vtt = tmp_path / "long.srt", tmp_path / "long.vtt"
    done = translate(longest, "--window", 1, "--overlap", 0.25, "--srt", srt, "--vtt", vtt)
    assert done.code == 0, done.err
    lines = [line.split("\t") for line in done.out.splitlines()]
    assert len(lines) > 3 and all(len(line) == 3 for line in lines)
    assert lines[0][:2] == ["00:00:00.000", "00:00:01.000"]
    stamp = r"\d\d:\d\d:\d\d[,.]\d{3}"
    assert re.search(rf"^1\n{stamp} --> {stamp}\n\S", srt.read_text())
    assert re.search(rf"^WEBVTT\n\n{stamp} --> {stamp}\n\S", vtt.read_text())


def test_a_clip_beyond_what_the_model_reads_is_split(translate, clip_files: Clips) -> None:
    longest = max(clip_files, key=lambda file: file.stat().st_size)
    windows = translate(longest, "--json").json["translations"][0]["windows"]
    assert len(windows) > 1 and all(window["end"] - window["start"] <= 64 / 12.5 for window in windows)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["none.pose"], ["none.pose"]),
        (["empty.pose"], ["empty.pose", "empty"]),
        (["no_frames.pose"], ["no_frames.pose", "no frames"]),
        (["text.pose"], ["text.pose", "version"]),
        (["notes.txt"], ["notes.txt", ".pose"]),
        (["folder"], ["folder", ".pose"]),
        (["clips.zip:none"], ["clips.zip", "none"]),
        (["broken.zip"], ["broken.zip"]),
        (["clips.zip", "--window", "100"], ["--window 100", "0.16 to 5.04"]),
        (["clips.zip", "--window", "4", "--overlap", "3"], ["--overlap 3", "0 to 2"]),
        (["clips.zip", "--srt", "x.srt"], ["--srt", "6"]),
        (["clips.zip", "--device", "nowhere"], ["--device nowhere"]),
        (["clips.zip", "--language", "ins"], ["--language", "trained without"]),
        (["clips.zip", "--target-language", "hi_IN"], ["--target-language", "trained without"]),
        (["clips.zip", "--model", "folder"], ["folder", "config.json"]),
        (["clips.zip", "--model", "runs"], ["runs"]),
        (["clips.zip", "--model", "no_processor"], ["no_processor", "processor_config.json"]),
        (["clips.zip", "--model", "other"], ["other", "t5"]),
        (["clips.zip", "--model", "truncated"], ["truncated"]),
    ],
)
def test_mistakes_are_an_error_with_a_hint_and_exit_code_2(
    translate, model_folder: Path, clip_files: Clips, tmp_path, monkeypatch, arguments: list[str], named: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    content = clip_files[0].read_bytes()
    Path("folder").mkdir()
    Path("empty.pose").touch()
    for name in ("text.pose", "notes.txt", "broken.zip"):
        Path(name).write_text("certainly neither a pose nor a zip, and long enough for either to be looked for")
    # fps, number of frames and people stand before the body, whose 75 points x 4 values x 4 bytes a frame follow.
    header = len(content) % (75 * 4 * 4)
    while content[header - 10 : header - 6] != bytes.fromhex("0000c841"):
        header += 75 * 4 * 4
    Path("no_frames.pose").write_bytes(content[: header - 6] + bytes(4) + content[header - 2 : header])
    with zipfile.ZipFile("clips.zip", "w") as archive:
        for file in clip_files:
            archive.write(file, file.name)
    for name in ("no_processor", "other", "truncated"):
        shutil.copytree(model_folder, name)
    Path("no_processor/processor_config.json").unlink()
    Path("other/config.json").write_text('{"model_type": "t5"}')
    os.truncate("truncated/model.safetensors", 1000)
    done = translate(*arguments)
    assert done.code == 2
    assert [line.split()[0] for line in done.err.splitlines()] in (["error:", "hint:"], ["error:"]), done.err
    assert all(name in done.err for name in named), done.err
    assert done.out == ""


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--n-best", "0"], "--n-best must be at least 1"),
        (["--n-best", "5", "--num-beams", "2"], "--num-beams 5"),
        (["--srt", "clip.pose"], "ends in .srt"),
        (["--max-rejects", "2"], "--max-rejects is a share"),
    ],
)
def test_wrong_usage_is_exit_code_2(translate, clip_files: Clips, arguments: list[str], complaint: str) -> None:
    done = translate(clip_files[0], *arguments)
    assert done.code == 2 and complaint in done.err
