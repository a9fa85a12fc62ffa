"""Quotes, separators and line ends of programs and spreadsheets: a table is read whole, or an error names the line."""

import csv
import io

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from toolkit.corpus.table import Row, read_table
from toolkit.errors import UserError


def _read(tmp_path, content: str | bytes, name: str = "table.csv") -> list[Row]:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(path)


def _texts(rows: list[Row]) -> list[tuple[str, str]]:
    return [(row.uid, row.text) for row in rows]


def test_in_a_table_with_tabs_a_quote_is_a_character(tmp_path) -> None:
    content = 'uid\tvideo\ttext\na\tv\t"night\nb\tv\t"Stop" he says\nc\tv\t"Stop"\nd\tv\t5" wide\n'
    assert _texts(_read(tmp_path, content)) == [
        ("a", '"night'),
        ("b", '"Stop" he says'),
        ("c", '"Stop"'),
        ("d", '5" wide'),
    ]


def test_tabs_with_the_quotes_of_spreadsheets_and_pandas(tmp_path) -> None:
    assert _read(tmp_path, 'uid\ttext\na\t"say ""hi"""\n')[0].text == 'say "hi"'
    assert _read(tmp_path, '"uid"\t"text"\n"a"\t"one\ttwo\nthree"\n')[0].text == "one two three"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('uid,text\na,x\nb,"one\nc,two\nd,"three\n', 3),
        ('uid,text\na,"one\nb,two\nc,he says Stop"\nd,x\n', 2),
        ('uid,text\na,"one\nb,two"\n', 2),
        ('uid,text,split\na,"one,train\nb,two",train\n', 2),
        ('uid, text\na, "one\nb, two"\n', 2),
        ('uid,text\na-1,"one\na-2, two\na-3, three"\n', 2),
        ('uid,text,w\na,",x\nb, ",x\n', 2),
        ('text,uid\n"one,a\ntwo,b\n"three",c\n', 2),
        ('uid;text\na;"one\nb;two, three"\n', 2),
        ('uid,text\na,"one\n', 2),
        ('uid,text\na,x\nb,"one\n\n"c,d\n', 3),
        ('uid,text\na,"say "hi""\n', 2),
        ('uid,text\na,"x, y" z\n', 2),
        ('uid,text,note\na,x,\nb,"one\ntwo\n",z,"\n', 3),
        ('uid,text,"note\na,x,y\nb,"z",\n', 1),
    ],
)
def test_an_open_quote_is_an_error_where_it_opened(tmp_path, content: str, line: int) -> None:
    with pytest.raises(UserError, match=f"table.csv, line {line}: a quote") as raised:
        _read(tmp_path, content)
    assert raised.value.hint


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('uid,text\na,"one\n\ntwo"\nb,x\n', "one two"),
        ('uid,text\n"a" , "one" \nb,x\n', "one"),
        ('uid, text\na, "one, ""two"""\nb, x\n', 'one, "two"'),
        ('uid,text\na,"Stop" he says\nb,x\n', '"Stop" he says'),
        ('uid,text\na,say "hi"\nb,x\n', 'say "hi"'),
        ('uid,text\na,""\nb,x\n', ""),
        ('uid,text\na,"""night"\nb,x\n', '"night'),
    ],
)
def test_quotes_in_csv(tmp_path, content: str, text: str) -> None:
    assert _texts(_read(tmp_path, content)) == [("a", text), ("b", "x")]


def test_separators_missing_at_the_end_of_lines(tmp_path) -> None:
    content = "uid,text,language\ns-1,x,ase\n" + "".join(f"s-{number},y\n" for number in range(2, 20))
    rows = _read(tmp_path, content)
    assert len(rows) == 19 and rows[0].language == "ase" and (rows[-1].text, rows[-1].language) == ("y", "")


def test_lines_of_prose_are_no_rows(tmp_path) -> None:
    content = 'uid,text\na-1,"Well, you\nand, too\nof course, and so on"\na-2,"x\nno"\n'
    assert _texts(_read(tmp_path, content)) == [("a-1", "Well, you and, too of course, and so on"), ("a-2", "x no")]


def test_the_hints_on_quotes_work(tmp_path) -> None:
    lines = ["uid,text", 'a,say "hi", you', 'b,"night', "c,x", 'd,"y']
    with pytest.raises(UserError, match="line 2 has 3 values for 2 columns"):
        _read(tmp_path, "\n".join(lines))
    lines[1] = 'a,"say "hi", you"'
    with pytest.raises(UserError, match="line 2: a quote") as raised:
        _read(tmp_path, "\n".join(lines))
    assert '"say ""hi"""' in raised.value.hint
    lines[1] = 'a,"say ""hi"", you"'
    with pytest.raises(UserError, match=r"line 3: a quote .* line 4"):
        _read(tmp_path, "\n".join(lines))
    lines[2], lines[4] = 'b,"""night"', 'd,"y"'
    assert _texts(_read(tmp_path, "\n".join(lines))) == [
        ("a", 'say "hi", you'),
        ("b", '"night'),
        ("c", "x"),
        ("d", "y"),
    ]


@pytest.mark.parametrize(
    "content",
    [
        "uid,text,,\na,x,,\nb,y,,\n",
        "uid,text\na,x,,\nb,y,,\n,,\n,\n\n",
        "uid,text,,\na,x\nb,y,\n",
        "sep=;\nuid;text\na;x\nb;y\n",
        '"sep=;"\r\nuid;text\r\na;x\r\nb;y\r\n',
        "SEP=|\nuid|text\na|x\nb|y\n",
        "sep=,,\nuid,text,\na,x,\nb,y,\n",
        ",,\nuid,text,\na,x,\nb,y,\n",
        ",uid,text\n0,a,x\n1,b,y\n",
        "uid,text,split;x,video;y,pose;z,w;v;u\na,x\nb,y\n",
        'uid,text,"note\n(free)"\na,x,\nb,y,\n',
        "uid,text,language\na,x\nb,y\n".replace("language", "w,z"),
        "uid,text\ra,x\rb,y\r",
        "uid,text\r\r\na,x\r\r\nb,y\r\r\n",
        "\ufeff\ufeffuid,text\na,x\n\ufeffb,y\n",
        "\ufeffuid\ttext\na\tx\nb\ty\n".encode("utf-16"),
        "uid\ttext\r\na\tx\r\nb\ty\r\n".encode("utf-16"),
        "\ufeffuid,text\na,x\nb,y\n".encode("utf-16-be"),
        "uid,text\na,x\nb,y\n".encode("utf-32"),
    ],
)
def test_habits_of_spreadsheets(tmp_path, content: str | bytes) -> None:
    assert _texts(_read(tmp_path, content)) == [("a", "x"), ("b", "y")]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("uid,text,,\na,red, door,\n", "line 2 has 3 values for 2 columns"),
        ("uid,text,,split\na,red, door,train\n", "line 2 .*column 3"),
        ("uid,text\na,Well,\nb,y\n", "line 3 ends in 0 .* in 1"),
        ("uid,text\na,one\ntwo\n", "line 3 has 1 values for 2 columns"),
        ("uid,text,language\na,one\ntwo,ase\n", "line 3 has 2 values for 3 columns"),
        ("uid\ttext\na\tone\ntwo\n", "line 3 has 1 values for 2 columns"),
        ('uid\ttext\tlanguage\na\t"one\nb"\t\t\n', "line 2 has 2 values for 3 columns"),
        ("uid\ttext\na\tone\ttwo\n", "line 2 has 3 values for 2 columns"),
        ("uid,text\na,x\nuid,text\nb,y\n", "line 3 .*header"),
        ("uid,text\na,x\ntext,uid\ny,b\n", "line 3 .*header"),
        ("uid,text,text\na,b,c\n", "line 1 .*twice: text"),
    ],
)
def test_a_line_whose_text_would_be_lost_is_an_error(tmp_path, content: str, named: str) -> None:
    with pytest.raises(UserError, match=named) as raised:
        _read(tmp_path, content)
    assert raised.value.hint


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("uid,text,\na,x,see video\n", "uid,text,note\na,x,see video\n"),
        ("uid,text\na,one\ntwo\n", 'uid,text\na,"one\ntwo"\n'),
        ("uid,text,w\nb,y,\nc,z,v,u\n", "uid,text,w,t\nb,y,,\nc,z,v,u\n"),
        ("uid,text,w\na,x\nb,y\n", "uid,text,w\na,x,\nb,y,\n"),
        ("uid,text\na,x\nuid,text\nb,y\n", "uid,text\na,x\nb,y\n"),
        ("uid,text\na\n", "uid,text\na,\n"),
    ],
)
def test_the_hints_work(tmp_path, before: str, after: str) -> None:
    with pytest.raises(UserError):
        _read(tmp_path, before)
    assert _read(tmp_path, after)


# The invariant: rows that are written are read, for all separators, quotes, line ends and encodings.

_TEXT = st.text(st.sampled_from(list("ab é😀न\"',;|\t\n")), max_size=12)
_ROWS = st.lists(st.tuples(_TEXT, st.sampled_from(["", "ase", "x y"])), min_size=1, max_size=6)
_LINE_ENDS = st.sampled_from(["\n", "\r\n", "\r"])
_ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"])
_HABITS = st.sampled_from(["", "sep", "blank lines", "empty rows", "empty columns", "index"])


def _spelling(text: str) -> list[str]:
    return text.split()


def _written(rows, separator: str, quoting: int, line_end: str, habit: str) -> str:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=separator, quoting=quoting, lineterminator=line_end)
    more = [""] * 2 if habit == "empty columns" else []
    if habit == "sep":
        file.write(f"sep={separator}{line_end}")
    for number, row in enumerate([("uid", "text", "language"), *rows]):
        index = ["" if number == 0 else str(number)] if habit == "index" else []
        writer.writerow([*index, *row, *more])
        if habit == "blank lines":
            file.write(line_end)
    if habit == "empty rows":
        file.write(separator * 2 + line_end + separator * 2 + line_end)
    return file.getvalue()


def _check_invariant(tmp_path, examples: int) -> None:
    path = tmp_path / "table.csv"

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(
        _ROWS,
        st.sampled_from(",;|\t"),
        st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
        _LINE_ENDS,
        _ENCODINGS,
        _HABITS,
    )
    def run(drawn, separator: str, quoting: int, line_end: str, encoding: str, habit: str) -> None:
        # A tab within a text can only be written if the header is quoted.
        assume(separator != "\t" or quoting != csv.QUOTE_MINIMAL or not any("\t" in text for text, _ in drawn))
        rows = [(f"s{n}", text.replace("\n", line_end), language) for n, (text, language) in enumerate(drawn)]
        path.write_bytes(_written(rows, separator, quoting, line_end, habit).encode(encoding))
        try:
            found = read_table(path)
        except UserError:
            # Only a text on several lines may be taken for rows of the table.
            assert any("\n" in text for text, _ in drawn)
            return
        assert [(row.uid, _spelling(row.text), row.language) for row in found] == [
            (uid, _spelling(text), language) for uid, text, language in rows
        ]

    run()


def test_rows_in_are_rows_out_character_by_character(tmp_path) -> None:
    _check_invariant(tmp_path, 300)


@pytest.mark.nightly
def test_rows_in_are_rows_out_in_many_tables(tmp_path) -> None:
    _check_invariant(tmp_path, 20_000)


def _check_unquoted(tmp_path, examples: int) -> None:
    path = tmp_path / "table.csv"
    texts = st.lists(st.sampled_from(["a", "b c", '"', '"', ", ", ",", " ", "d", ";"]), max_size=6).map("".join)

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.lists(texts, min_size=1, max_size=6), st.sampled_from(",;\t"), st.booleans(), _LINE_ENDS)
    def run(texts: list[str], separator: str, last: bool, line_end: str) -> None:
        rows = [(f"s{n}", text, *([] if last else ["ase"])) for n, text in enumerate(texts)]
        assume(separator != "\t" or not any('""' in text for text in texts))
        assume(not all(text.rstrip(' "').endswith(separator) for text in texts))
        lines = [separator.join(row) for row in [("uid", "text", *([] if last else ["language"])), *rows]]
        path.write_bytes(line_end.join(lines).encode())
        try:
            found = read_table(path)
        except UserError as error:
            assert "line " in str(error) and separator != "\t"
            return
        # Quotes may be those of CSV; every other character belongs to the text, and every line is a row.
        assert [(row.uid, "".join(row.text.replace('"', "").split())) for row in found] == [
            (uid, "".join(text.replace('"', "").split())) for uid, text, *_ in rows
        ]
        assert separator != "\t" or [row.text.split() for row in found] == [text.split() for text in texts]

    run()


def test_tables_that_were_joined_by_hand_lose_nothing(tmp_path) -> None:
    _check_unquoted(tmp_path, 300)


@pytest.mark.nightly
def test_many_tables_that_were_joined_by_hand_lose_nothing(tmp_path) -> None:
    _check_unquoted(tmp_path, 20_000)
