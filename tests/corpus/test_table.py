import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolkit.corpus.published.presets import presets
from toolkit.corpus.table import read_table
from toolkit.corpus.table_lines import LONGEST_LINE
from toolkit.errors import UserError


def _table(tmp_path, content: str | bytes, name: str = "table.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_every_usual_form_reads_alike(tmp_path, separator: str, newline: str, mark: str) -> None:
    lines = [["uid", "text", "split"], ["a", '"say ""hi"""', "val"], ["b", "  two \t words ".replace("\t", " "), ""]]
    rows = read_table(_table(tmp_path, mark + newline.join(separator.join(line) for line in lines) + newline))
    assert [(row.uid, row.text, row.split, row.line) for row in rows] == [
        ("a", 'say "hi"', "dev", 2),
        ("b", "two words", "", 3),
    ]


def test_jsonl(tmp_path) -> None:
    lines = [{"id": 7, "say": "नमस्ते", "video": None}, {"id": "b", "say": "x", "video": "v"}]
    path = _table(tmp_path, "\n\n".join(json.dumps(line) for line in lines), "t.jsonl")
    rows = read_table(path, {"uid": "id", "text": "say"})
    assert [(row.uid, row.text, row.video) for row in rows] == [("7", "नमस्ते", ""), ("b", "x", "v")]


def test_a_quoted_text_may_span_lines(tmp_path) -> None:
    rows = read_table(_table(tmp_path, 'uid,text\na,"one\ntwo"\nb,three\n'))
    assert [row.text for row in rows] == ["one two", "three"]


def test_what_is_known_of_a_clip(tmp_path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('uid,text,language,target_language,hint,context\na,b,ins,hi_IN,shortly,"It\nrains."\n')
    (row,) = read_table(path, {"prompt": "hint"})
    assert (row.language, row.target_language, row.prompt, row.context) == ("ins", "hi_IN", "shortly", "It rains.")


def test_times_count_only_when_they_are_mapped(tmp_path) -> None:
    path = _table(tmp_path, "uid,text,start,end\na,x,1.5,2\n")
    assert read_table(path)[0].start is None
    row = read_table(path, {"start": "start", "end": "end"})[0]
    assert (row.start, row.end) == (1.5, 2.0)


def test_the_how2sign_preset(tmp_path) -> None:
    header = "VIDEO_ID\tVIDEO_NAME\tSENTENCE_ID\tSENTENCE_NAME\tSTART_REALIGNED\tEND_REALIGNED\tSENTENCE"
    path = _table(tmp_path, f"{header}\nv1\tv1-5-rgb\tv1_0\tv1_0-5-rgb_front\t0.0\t2.1\tHi, all.\n")
    row = read_table(path, preset=presets()["how2sign"])[0]
    assert (row.uid, row.video, row.text, row.start) == ("v1_0-5-rgb_front", "v1", "Hi, all.", None)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "rows"),
        ("uid,text\n", "rows"),
        ("id,text\na,b\n", r"line 2 .*'uid' .*\bid, text"),
        ("uid,text,text\na,b,c\n", "line 1 .*twice: text"),
        ("uid,text\na,b,c\n", "line 2 has 3 values for 2 columns"),
        ("uid,text\na,\0\n", "NUL"),
        (b"uid,text\na,\xff\xfe\n", "line 2 .*UTF-8"),
        ("uid,text\na," + "x" * (LONGEST_LINE + 1), "line 2 .*1,048,576"),
        ('uid,text\na,"' + "x\n" * 600_000, "line 2: a quote"),
    ],
)
def test_a_file_that_is_no_table_is_an_error_with_its_line(tmp_path, content, named: str) -> None:
    with pytest.raises(UserError, match=named) as raised:
        read_table(_table(tmp_path, content))
    assert "table.csv" in raised.value.message and raised.value.hint


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ({"uid": "a", "text": ["x"]}, "text .* list"),
        ({"uid": "a", "text": {"en": "x"}}, "text .* dict"),
        ({"uid": "a", "text": True}, "text .*'True' .*bool"),
        ({"uid": "a", "text": 7}, "text .*'7' .*int"),
        ({"uid": "a", "text": float("nan")}, "text .*'nan' .*float"),
        ({"uid": 7.0, "text": "x"}, "uid .*'7.0' .*float"),
        ({"uid": "a", "text": "x", "fps": True}, "fps .*'True' .*bool"),
        ({"uid": "a", "text": "half \ud83d of it"}, r"text holds '\\ud83d'"),
        ({"uid": "a", "text": "x\0"}, r"text holds '\\x00'"),
        ({"uid": "a\nb", "text": "x"}, "the uid"),
        ('{"uid": "a", "text": "x", "text": "y"}', "'text' twice"),
    ],
)
def test_a_json_value_that_is_no_text_is_refused_with_its_line(tmp_path, line, named: str) -> None:
    content = '{"uid": "s", "text": "fine"}\n\n' + (line if isinstance(line, str) else json.dumps(line))
    with pytest.raises(UserError, match=f"line 3.*{named}"):
        read_table(_table(tmp_path, content, "t.jsonl"))


def test_json_needs_no_suffix_and_other_columns_may_hold_anything(tmp_path) -> None:
    content = '{"uid": 7, "text": "x", "fps": 25, "boxes": [[1, 2]], "ok": true}\n'
    row = read_table(_table(tmp_path, content, "t.json"))[0]
    assert (row.uid, row.text, row.fps) == ("7", "x", 25.0)
    for content in ('[{"uid": "a", "text": "b"}]', '[\n{"uid": "a", "text": "b"}\n]'):
        with pytest.raises(UserError, match="JSON list"):
            read_table(_table(tmp_path, content, "t.json"))


@pytest.mark.parametrize(
    ("written", "split"),
    [
        ("Train", "train"),
        ("TRAIN set", "train"),
        ("training-set", "train"),
        ("trainset", "train"),
        ("Validation", "dev"),
        ("dev_split", "dev"),
        ("Testing data", "test"),
        ("test_unseen", "test_unseen"),
        ("Fold_1", "fold_1"),
        ("", ""),
    ],
)
def test_the_names_of_splits_as_people_write_them(tmp_path, written: str, split: str) -> None:
    assert read_table(_table(tmp_path, f"uid,text,split\na,b,{written}\n"))[0].split == split


@pytest.mark.parametrize("written", ["../up", "..", "my part", "corpus.json", "progress", "ä"])
def test_a_split_name_that_is_no_folder_name_is_an_error(tmp_path, written: str) -> None:
    with pytest.raises(UserError, match=f"line 2: '{re.escape(written)}'"):
        read_table(_table(tmp_path, f"uid,text,split\na,b,{written}\n"))


@pytest.mark.parametrize(
    ("content", "fps"),
    [
        ("uid;text;fps\na;b;29,97\n", 29.97),
        ("uid;text;fps\na;b;1,234\n", 1.234),
        ('uid,text,fps\na,b,"25,0"\n', 25.0),
        ("uid\ttext\tfps\na\tb\t12,5\n", 12.5),
        ("uid,text,fps\na,b,2.5e1\n", 25.0),
    ],
)
def test_decimal_commas(tmp_path, content: str, fps: float) -> None:
    assert read_table(_table(tmp_path, content))[0].fps == fps


def test_a_comma_before_three_digits_is_ambiguous(tmp_path) -> None:
    with pytest.raises(UserError, match="line 2: fps is '1,234'"):
        read_table(_table(tmp_path, 'uid,text,fps\na,b,"1,234"\n'))


@pytest.mark.parametrize(("line", "named"), [("{,", "JSON"), ("[1]", "JSON object"), ("[" * 10**5, "JSON")])
def test_a_line_that_is_no_json_object_is_an_error(tmp_path, line: str, named: str) -> None:
    with pytest.raises(UserError, match=f"line 1 .*{named}"):
        read_table(_table(tmp_path, line, "t.jsonl"))


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf", "1_0", "1e999", "0:00:00:01"])
def test_impossible_times(tmp_path, value: str) -> None:
    with pytest.raises(UserError, match="line 2: start "):
        read_table(_table(tmp_path, f"uid,text,start\na,b,{value}\n"), {"start": "start"})


def test_a_missing_table_and_an_unknown_column(tmp_path) -> None:
    with pytest.raises(UserError, match=r"none\.csv"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(UserError, match=r"data\.columns .*txt"):
        read_table(_table(tmp_path, "uid,text\na,b\n"), {"txt": "text"})


_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_FRAGMENTS = st.sampled_from(
    ["uid", "text", ",", "\t", '"', "\n", "\r\n", "\r", "\0", "a", "é", "\ufeff", "'", ";", "|", " "]
)
_MUTATED = st.lists(_FRAGMENTS, max_size=40).map(lambda parts: ("uid,text\na,b\n" + "".join(parts)).encode())


def _check_bytes(tmp_path, examples: int) -> None:
    path = tmp_path / "fuzzed.csv"

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(_MUTATED | st.binary(max_size=200) | _MUTATED.map(lambda content: content[13:]))
    def run(content: bytes) -> None:
        path.write_bytes(content)
        try:
            rows = read_table(path)
            assert rows and all("\n" not in row.text and row.line >= 2 for row in rows)
        except UserError as error:
            assert "\n" not in str(error)

    run()


def test_any_bytes_are_rows_or_one_line(tmp_path) -> None:
    _check_bytes(tmp_path, 500)


@pytest.mark.nightly
def test_many_bytes_are_rows_or_one_line(tmp_path) -> None:
    _check_bytes(tmp_path, 20_000)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def _check_json(tmp_path, examples: int) -> None:
    path = tmp_path / "table.jsonl"

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.lists(_JSON, min_size=1, max_size=4), st.booleans(), st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
    def run(texts: list, escaped: bool, encoding: str) -> None:
        lines = [
            json.dumps({"uid": number, "text": text, "extra": text}, ensure_ascii=escaped)
            for number, text in enumerate(texts)
        ]
        path.write_bytes("\n".join(lines).encode(encoding, "surrogatepass"))
        wrong = [
            n for n, text in enumerate(texts, 1) if not isinstance(text, str | None) or _NO_TEXT.search(text or "")
        ]
        try:
            found = read_table(path)
        except UserError as error:
            assert wrong and f"line {wrong[0]}" in str(error)
            assert len(str(error).splitlines()) == 1
            return
        assert not wrong
        assert [(row.uid, row.text.split()) for row in found] == [
            (str(number), (text or "").split()) for number, text in enumerate(texts)
        ]

    run()


def test_json_texts_are_whole_or_refused_with_their_line(tmp_path) -> None:
    _check_json(tmp_path, 200)


@pytest.mark.nightly
def test_many_json_texts_are_whole_or_refused_with_their_line(tmp_path) -> None:
    _check_json(tmp_path, 20_000)


@pytest.mark.parametrize(("name", "kind"), [("poses", "folder"), ("nowhere.csv", "no")])
def test_a_path_that_is_no_file_is_named_with_what_it_is(tmp_path, name: str, kind: str) -> None:
    (tmp_path / "poses").mkdir()
    with pytest.raises(UserError, match=kind) as refusal:
        read_table(tmp_path / name)
    assert str(tmp_path / name) in refusal.value.message
