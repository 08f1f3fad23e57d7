"""The texts in rows. Oracle: the rows that were written."""

import csv
import io
import json
from random import Random

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt2.corpus.options import TextConfig
from minigpt2.corpus.sources import rows
from minigpt2.corpus.sources.documents import read_documents
from minigpt2.corpus.sources.files import UnpackedFile
from minigpt2.errors import InputError
from text_files import (
    DOCUMENTS,
    LATIN,
    PACK,
    PLAIN,
    SHAPES,
    content_of,
    documents_of,
    parquet,
    quick,
    table,
    texts,
    texts_of,
    write,
)

# Python 3.10's csv takes no NULs.
columns = st.lists(texts.map(lambda text: text.replace("\0", "")), max_size=5)


@pytest.mark.parametrize("suffix", SHAPES)
def test_rows_are_numbered_from_one_and_their_texts_untouched(tmp_path, suffix):
    texts = [*DOCUMENTS, "", "\n", "end"]
    source = write(tmp_path, f"a{suffix}", SHAPES[suffix](texts))
    numbers = range(1, 2 * len(texts), 2) if suffix == ".ndjson" else range(1, len(texts) + 1)
    assert documents_of(source) == [(row, "", text) for row, text in zip(numbers, texts)]


@quick
@given(columns, st.integers(1, 40), st.sampled_from(sorted(PACK)))
def test_rows_do_not_depend_on_the_chunk_size(texts, chunk_bytes, packing):
    for suffix, make in SHAPES.items():
        got = content_of(f"a{suffix}{packing}", PACK[packing](make(texts)), chunk_bytes=chunk_bytes)
        assert [text for _, _, text in got] == texts


@quick
@given(columns, st.sampled_from(["\n", "\r\n", "\r"]), st.integers(1, 9))
def test_tables_may_end_their_lines_in_any_way(texts, newline, chunk_bytes):
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator=newline, quoting=csv.QUOTE_ALL)
    writer.writerows([["text"], *([text] for text in texts)])
    got = content_of("a.csv", file.getvalue(), chunk_bytes=chunk_bytes)
    assert [text for _, _, text in got] == texts


DELIMITERS = [",", ";", "\t", "|"]
names = st.sampled_from(["n", "", "a,b", "x;y", "p|q", "t\tu", 'say "x"', "two\nlines", "Text"])


@quick
@given(
    st.lists(names, max_size=3, unique=True),
    st.lists(names, max_size=2, unique=True),
    columns,
    st.sampled_from(DELIMITERS),
    # With "\n" alone it puts no quotes around "\r" unless it does so around all.
    st.sampled_from([("\r\n", csv.QUOTE_MINIMAL), ("\r\n", csv.QUOTE_ALL), ("\n", csv.QUOTE_ALL)]),
    st.sampled_from(["", "\ufeff"]),
    st.integers(1, 40),
)
def test_rows_come_back_with_any_delimiter(
    before, after, texts, delimiter, form, mark, chunk_bytes
):
    newline, quoting = form
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, lineterminator=newline, quoting=quoting)
    left, right = ["x;,|\t"] * len(before), ['"\n'] * len(after)
    writer.writerows([[*before, "text", *after], *([*left, text, *right] for text in texts)])
    content, rows = mark + file.getvalue(), [(n, "", text) for n, text in enumerate(texts, 1)]
    assert content_of("a.csv", content, chunk_bytes=chunk_bytes) == rows
    given = TextConfig(csv_delimiter=r"\t" if delimiter == "\t" else delimiter)
    for name in ("a.csv", "a.tsv"):
        assert content_of(name, content, given, chunk_bytes=chunk_bytes) == rows
    if delimiter == "\t":
        assert content_of("a.tsv", content) == rows
    said = f"{mark}sep={delimiter}{newline}{file.getvalue()}"
    assert content_of("a.csv", said, chunk_bytes=chunk_bytes) == rows


TABLES = [  # name, content, options, texts
    ("a.csv", "text\none; two; three\n|\t;\n", {}, ["one; two; three", "|\t;"]),
    ("a.csv", '"text"\n"a;b, c"\n', {}, ["a;b, c"]),
    ("a.csv", "id;text\n1;a, b, c, d\n", {}, ["a, b, c, d"]),
    ("a.csv", "\n\r\n\nid;text\n\n1;a\n", {}, ["a"]),
    ("a.csv", "a;prompt;completion\n1;;x, y\n", {}, ["x, y"]),
    ("a.csv", "prompt;completion,text;n\n1;2,3;4\n", {}, "are prompt, completion,text, n:"),
    ("a.csv", "text;x,text|y\n1;2,3|4\n", {}, ["1"]),  # of several, the first in the list
    ("a.csv", "text;x,text,y\n1;2,3,4\n", {}, ["3"]),  # but the comma before all
    ("a.csv", '"first\nline";text\n1;a\n', {}, ["a"]),
    ("a.csv", 'n,"te;xt"\n1,a\n', {"text_field": "te;xt"}, ["a"]),
    ("a.csv", "sep=;\r\nid;text\r\n1;a,b\r\n", {}, ["a,b"]),
    ("a.csv", "\ufeffSEP=;\nid;text\n1;a,b\n", {}, ["a,b"]),
    ("a.csv", '"sep=:"\nid:text\n1:a,b\n', {}, ["a,b"]),
    ("a.tsv", "sep=;\nid;text\n1;a\tb\n", {}, ["a\tb"]),
    ("a.csv", "sep=;\nid:text\n1:a;b\n", {"csv_delimiter": ":"}, ["a;b"]),
    ("a.csv", "sep=;\n", {}, []),
    ("a.csv", "sep=;;n\n1;2;3\n", {}, "no field 'text'; its fields are sep=, , n:"),
    ("a.tsv", "id;text\n1;a\n", {}, "no field 'text'; its fields are id;text:"),
    ("a.csv", "id;text\n1;a\n", {"csv_delimiter": ","}, "its fields are id;text:"),
    ("a.csv", "id:text\n1:a\n", {}, "its fields are id:text:"),
    ("a.csv", "one|two|three;four\n1|2|3\n", {}, "its fields are one, two, three;four:"),
    ("a.csv", "title;text\n", {}, []),
    ("a.csv", "title;body\n", {}, []),
    ("a.csv", "\ufeff\r\n", {}, []),
    ("a.csv", "", {}, []),
    ("a.csv", 'id,"text\n1,a\n', {}, "a.csv:row 1 cannot be read, near line 2: unexpected end"),
    ("a.csv", 'sep=;\nid;text\n1;"a\n', {}, "a.csv:row 1 cannot be read, near line 3: unexpected"),
    ("a.csv", "id;text\n1;a\n2;b;c\n", {}, "a.csv:row 2 has 3 fields, its header has 2: "
     "put fields with ';' in them in quotes (\"...\"), or name another csv_delimiter"),
    ("a.csv", "text;text\n1;a\n", {}, "a.csv:row 1 has 2 columns 'text': give each a name"),
    ("a.csv", "n,n,text\n1,2,a\n", {}, ["a"]),
    # several columns
    ("a.csv", "b,c,a\n2,3,1\n", {"csv_columns": "a,b"}, ["1\n2"]),
    ("a.tsv", "b\tc\ta\n2\t3\t1\n", {"csv_columns": "a,b"}, ["1\n2"]),
    ("a.csv", "b;c;a\n2;3;1,5\n", {"csv_columns": "a,b"}, ["1,5\n2"]),
    ("a.csv", "a,b,c\n1,,3\n,,\n, ,3\n", {"csv_columns": "a,b,c"}, ["1\n3", "", " \n3"]),
    ("a.csv", 'a,b\n"x\n",y\n', {"csv_columns": "a,b"}, ["x\n\ny"]),
    ("a.csv", '"a, b";text\n1;2\n', {"csv_columns": 'text,"a, b"'}, ["2\n1"]),
    ("a.csv", "text,b\n1,2\n", {"csv_columns": "b", "text_field": "text"}, ["2"]),
    ("a.csv", "prompt,completion\n1,2\n", {"csv_columns": "completion"}, ["2"]),
    ("a.csv", '" a",b\n1,2\n', {"csv_columns": "b, a"}, ["2\n1"]),
    ("a.csv", "", {"csv_columns": "a"}, []),
    ("a.csv", "b\n", {"csv_columns": "a"}, []),
    ("a.csv", "a,b\n1,2\n", {"csv_columns": "a, b"}, "a.csv:row 1 has no column ' b' "
     "(did you mean 'b'?); its columns are a, b: name them with csv_columns"),
    ("a.csv", "Title;b\n1;2\n", {"csv_columns": "title"},
     "'title' (did you mean 'Title'?); its columns are Title, b:"),
    ("a.csv", "b,title\n1,2\n", {"csv_columns": "b,titel"}, "'titel' (did you mean title?); its"),
    ("a.csv", "b,c\n1,2\n", {"csv_columns": "xyz"}, "has no column 'xyz'; its columns are b, c:"),
    ("a.csv", "k" * 999 + "\n1\n", {"csv_columns": "a"}, f"are {'k' * 200}...:"),
    ("a.csv", "a,b,a\n1,2,3\n", {"csv_columns": "b,a"}, "a.csv:row 1 has 2 columns 'a': give"),
    ("a.csv", "a,b,a\n1,2,3\n", {"csv_columns": "b"}, ["2"]),
    ("a.jsonl", '{"text": "x", "a": "y"}', {"csv_columns": "a", "csv_delimiter": ";"}, ["x"]),
    # quotes that are text
    ("a.tsv", 'id\ttext\n1\t"a" b, "c\n', {"csv_plain_quotes": True}, ['"a" b, "c']),
    ("a.tsv", '"text"\n""\n', {"csv_plain_quotes": True}, "its fields are \"text\":"),
    ("a.csv", 'n;text\n"1;2"\n', {"csv_plain_quotes": True}, ['2"']),
    ("a.csv", "text\na,b\n", {"csv_plain_quotes": True}, "a.csv:row 1 has 2 fields, its header "
     "has 1: put fields with ',' in them in quotes (\"...\") and take csv_plain_quotes away, or "),
    ("a.tsv", 'text\n"a" b\n', {}, "where they are text, give csv_plain_quotes"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "options", "expected"), TABLES)
def test_tables_as_people_have_them(name, content, options, expected):
    for packing, chunk_bytes in (("", 1), ("", 2**20), (".gz", 7)):
        packed = PACK[packing](content.encode())
        got = content_of(name + packing, packed, TextConfig(**options), chunk_bytes=chunk_bytes)
        if isinstance(expected, str):
            assert expected in got.replace(packing + ":row", ":row") and "\n" not in got
        else:
            assert [text for _, _, text in got] == expected


@pytest.mark.parametrize("header", ["question;answer", "n;messages", "input;instruction;output"])
def test_a_delimiter_is_told_by_the_columns_of_chats_too(tmp_path, header):
    source = write(tmp_path, "a.csv", f"{header},a,b,c,d\n")
    assert rows.table_delimiter(UnpackedFile(source, 64), PLAIN) == ","
    source = write(tmp_path, "a.csv", f"{header};a,b,c,d,e\n")
    assert rows.table_delimiter(UnpackedFile(source, 64), PLAIN) == ";"


def test_a_delimiter_is_told_by_the_beginning_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "HEADER_CHARACTERS", 100)
    # With commas, the quote before "c" would take all of the file for the header.
    source = write(tmp_path, "a.csv", 'a;b,"c;text\n' + "1;2;some text\n" * 9999)
    file = UnpackedFile(source, 64)
    assert rows.table_delimiter(file, PLAIN) == ";"
    assert file.position < 70_000 < source.size
    assert texts_of(source) == ["some text"] * 9999


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@quick
@given(
    st.lists(st.text(max_size=9) | st.fixed_dictionaries({"text": st.text(), "x": json_values})),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
    st.integers(1, 40),
    st.integers(0, 400),
    st.sampled_from(["", "x", '"', "]", "}", ",", "\\", "\n", "1"]),
)
def test_json_and_its_errors_do_not_depend_on_the_chunk_size(
    rows, indent, ascii, chunk_bytes, at, damage
):
    content = json.dumps(rows, indent=indent, ensure_ascii=ascii)
    content = content[:at] + damage + content[at + len(damage) :]
    if content.count("\0") > 8:
        return
    whole = content_of("a.json", content)
    assert content_of("a.json", content, chunk_bytes=chunk_bytes) == whole
    if not damage:
        texts = [row if isinstance(row, str) else row["text"] for row in rows]
        assert whole == [(row, "", text) for row, text in enumerate(texts, 1)]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('{"text": "one"}', ["one"]),
        ('"one"', ["one"]),
        ("[]", []),
        (" \n", []),
        ("", []),
        ("[\n]\n[]", []),
        ('{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
        ('{"text":\n"one"}{"text": "two"}', ["one", "two"]),
        ('\ufeff[ "one" ,\r\n{"text" : null} ]', ["one", ""]),
        ('["\\ud83e\\udd17", {"text": "two", "score": NaN}]', ["🤗", "two"]),
    ],
)
def test_json_is_an_array_or_values_one_after_another(tmp_path, content, texts):
    source = write(tmp_path, "a.json", content)
    for chunk_bytes in (1, 5, 999):
        assert texts_of(source, chunk_bytes=chunk_bytes) == texts


@pytest.mark.parametrize("suffix", SHAPES)
def test_one_leading_mark_is_left_out_of_every_format(tmp_path, suffix):
    if suffix != ".parquet":
        content = b"\xef\xbb\xbf" + SHAPES[suffix](DOCUMENTS)
        assert texts_of(write(tmp_path, f"a{suffix}", content), chunk_bytes=1) == DOCUMENTS


PAIRS = [
    {"prompt": "two and two", "completion": " is four", "id": 7},
    {"prompt": "", "completion": "alone"},
    {"prompt": None, "completion": "too"},
    {"prompt": "no answer", "completion": ""},
    {"prompt": "", "completion": None},
]
AS_READ = [
    (1, "two and two", " is four"),
    (2, "", "alone"),
    (3, "", "too"),
    (4, "no answer", ""),
    (5, "", ""),
]


def test_prompts_and_completions_are_told_apart(tmp_path):
    contents = {
        "a.jsonl": "\n".join(map(json.dumps, PAIRS)),
        "a.json": json.dumps(PAIRS, indent=1),
        "a.csv": table(
            [["prompt", "completion"], *([p["prompt"], p["completion"]] for p in PAIRS)]
        ),
        "a.parquet": parquet({key: [p[key] for p in PAIRS] for key in ("completion", "prompt")}),
    }
    for name, content in contents.items():
        source = write(tmp_path, name, content)
        assert documents_of(source) == AS_READ, name
        assert documents_of(source, TextConfig(text_field="prompt"))[0] == (1, "", "two and two")
    first, *_ = read_documents(write(tmp_path, "a.jsonl", contents["a.jsonl"]), PLAIN)
    assert first[:3] == ("two and two", 1, False) and first.prompt


def test_the_text_field_goes_before_prompt_and_completion(tmp_path):
    row = {"prompt": "x", "completion": "y", "text": "z"}
    for suffix, content in (
        (".jsonl", json.dumps(row)),
        (".csv", table([row, row.values()])),
        (".parquet", parquet({key: [value] for key, value in row.items()})),
    ):
        assert documents_of(write(tmp_path, f"a{suffix}", content)) == [(1, "", "z")]


HALF = "\\ud800"
NO_FIELD = r"a\.{}:row {} has no field 'text'; its fields are title, body: name one with text_field"
BAD_ROWS = [
    ("jsonl", '{"text": "x"}\n\n{"title": 1, "body": 2}', NO_FIELD.format("jsonl", 3)),
    ("json", '[{"text": "x"}, {"title": 1, "body": 2}]', NO_FIELD.format("json", 2)),
    ("csv", "title,body\nx,y\n", NO_FIELD.format("csv", 1)),
    ("tsv", "title\tbody\nx\ty\n", NO_FIELD.format("tsv", 1)),
    ("parquet", parquet({"title": ["x"], "body": ["y"]}), NO_FIELD.format("parquet", 1)),
    (
        "json",
        '{"n": 1, "data": [{"text": "x"}]}',
        "are n, data: the rows seem to be in 'data'; save",
    ),
    ("json", '{"n": [{"k": "x"}], "m": [1]}', "are n, m: name one with text_field$"),
    ("jsonl", "{}", r"row 1 has no field 'text'; its fields are none: "),
    ("jsonl", json.dumps({"k" * 999: 1}), r"its fields are k{200}\.\.\.: "),
    ("jsonl", '{"text": "x"}\n{"text": 5}', r"row 2 has a number in 'text', allowed is a string"),
    ("json", '{"text": ["x"]}', r"a\.json:row 1 has an array in 'text', allowed is a string"),
    ("jsonl", '{"text": {"a": "x"}}', r"row 1 has an object in 'text'"),
    ("jsonl", '{"text": false}', r"row 1 has true or false in 'text'"),
    ("jsonl", '{"prompt": 0, "completion": "x"}', r"row 1 has a number in 'prompt'"),
    ("jsonl", '{"prompt": "x", "completion": 0.5}', r"row 1 has a number in 'completion'"),
    ("parquet", parquet({"text": [1, 2]}), r"a\.parquet:row 1 has int64 in 'text'"),
    ("parquet", parquet({"text": [b"x"]}), r"a\.parquet:row 1 has binary in 'text'"),
    ("jsonl", '["x"]', r"row 1 is an array, allowed is an object or a string"),
    ("jsonl", "null", r"row 1 is null, allowed"),
    ("json", '["x", 12]', r"row 2 is a number, allowed"),
    ("jsonl", f'{{"text": "x{HALF}"}}', r"row 1 has \\ud800, half a character, in 'text'"),
    ("json", f'["x", "{HALF}x"]', r"a\.json:row 2 has \\ud800, half a character"),
    ("jsonl", '{"text": "x"}\n{"text": "x}', r"a\.jsonl:row 2:column 10 is not JSON \(Unterm"),
    ("jsonl", '[\n"x"\n]', r"row 1:column 2 is not JSON .*; a file laid out otherwise is .*\.json"),
    ("jsonl", '{"text": "x"} {}', r"row 1:column 15 is not JSON \(Extra data\)"),
    ("jsonl", '{"n": ' + "1" * 9999 + "}", r"row 1 is not JSON \(.*digits"),
    ("jsonl", "[" * 99999, r"row 1 is not JSON \(maximum recursion"),
    ("json", "[" + '{"x":' * 99999, r"row 1 is not JSON, at line 1 column 2: maximum recursion"),
    (
        "json",
        '["x", {"n": ' + "1" * 9999 + "}]",
        r"row 2 is not JSON, at line 1 column 7: .*digits",
    ),
    ("json", '[\n "x",\n  {"text" "y"}]', r"row 2 is not JSON, at line 3 column 11: Expecting ':'"),
    ("json", '["x"\n"y"]', r"row 1 is not JSON, at line 2 column 1: Expecting ',' or '\]' after"),
    ("json", '["x",]', r"row 2 is not JSON, at line 1 column 6: Expecting value"),
    ("json", '["x", "y', r"row 2 is not JSON, at line 1 column 7: Unterminated string"),
    ("json", '["x", "y"', r"row 2 is not JSON, at line 1 column 10: Expecting ','"),
    ("json", '"x" y', r"row 2 is not JSON, at line 1 column 5: Expecting value"),
    ("csv", "id,text\n1,x,y\n", r"a\.csv:row 1 has 3 fields, its header has 2: put .* quotes"),
    ("csv", "id,text\n1,x\n\n2\n", r"a\.csv:row 2 has 1 fields, its header has 2"),
    ("csv", 'text\nx\n"y\nz\n', r"a\.csv:row 2 cannot be read, near line 4: unexpected end"),
    ("tsv", 'text\tid\n"x," he said\t1\n', r"a\.tsv:row 1 cannot be read, near line 2: '\\t' exp"),
]


@pytest.mark.parametrize(("suffix", "content", "message"), BAD_ROWS)
def test_a_row_without_text_is_named_with_what_is_wrong(tmp_path, suffix, content, message):
    source = write(tmp_path, f"a.{suffix}", content)
    for chunk_bytes in (7, 2**20):
        with pytest.raises(InputError, match=message) as problem:
            documents_of(source, chunk_bytes=chunk_bytes)
        assert "\n" not in str(problem.value)


def test_a_field_may_have_any_length_and_the_limit_of_csv_stays(tmp_path):
    text = "x, " * 100_000 + "\n"
    source = write(tmp_path, "a.csv", table([["text"], [text], ["y"]]))
    before = csv.field_size_limit(1234)
    try:
        rows = read_documents(source, PLAIN, chunk_bytes=50_000)
        assert next(rows).text == text and csv.field_size_limit() == 1234
        assert [row.text for row in rows] == ["y"] and csv.field_size_limit() == 1234
    finally:
        csv.field_size_limit(before)


def test_parquet_text_may_be_of_any_string_type(tmp_path):
    for kind in (
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ):
        column = pyarrow.array(["one", None, "日本"], pyarrow.string()).cast(kind)
        source = write(tmp_path, "a.parquet", parquet({"text": column}))
        assert texts_of(source) == ["one", "", "日本"]
    source = write(tmp_path, "a.parquet", parquet({"text": pyarrow.nulls(2)}))
    assert texts_of(source) == ["", ""]


def test_parquet_rows_are_numbered_through_all_its_groups(tmp_path):
    texts = [str(number) * 50 for number in range(300)]
    source = write(tmp_path, "a.parquet", parquet({"text": texts}, row_group_size=70))
    for chunk_bytes in (1, 1000, 2**20):
        chunks = list(read_documents(source, PLAIN, chunk_bytes=chunk_bytes))
        assert [(chunk.row, chunk.text) for chunk in chunks] == list(enumerate(texts, 1))


def test_parquet_files_that_are_damaged_or_none_are_named(tmp_path):
    whole = parquet({"text": ["The lamp is lit."] * 999})
    for data in (whole[:-9], whole[: len(whole) // 2], LATIN.encode(), b"PAR1", b""):
        source = write(tmp_path, "a.parquet", data)
        with pytest.raises(InputError, match=r"a\.parquet (is no whole Parquet|cannot be read)"):
            documents_of(source)
    pointer = write(tmp_path, "a.parquet", b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match=r"a\.parquet is a Git LFS pointer.*git lfs pull"):
        documents_of(pointer)


def test_a_damaged_parquet_file_is_a_line_of_visible_characters_and_ends_nothing(tmp_path):
    whole = parquet({"text": ["The lamp is lit."] * 99, "n": list(range(99))})
    random, messages = Random(2), []
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[-1 - random.randrange(600)] = random.choice([0, 10, 27, random.randrange(256)])
        try:
            documents_of(write(tmp_path, "a.parquet", bytes(damaged)))
        except InputError as problem:
            messages.append(str(problem))
    assert len(messages) > 100
    assert all(m.isprintable() and "a.parquet" in m for m in messages)
    assert any(r"what type: \x" in message for message in messages)  # a character of the file's


def test_text_in_parquet_that_is_not_utf8_is_named(tmp_path):
    column = pyarrow.array([b"fine", b"caf\xe9"]).view(pyarrow.string())
    source = write(tmp_path, "a.parquet", parquet({"text": column}))
    with pytest.raises(InputError, match=r"a\.parquet is no whole Parquet file \('utf-8'"):
        documents_of(source)


def test_long_json_is_parsed_few_times(tmp_path, monkeypatch):
    calls = []

    class Counting(json.JSONDecoder):
        def raw_decode(self, *args):
            calls.append(args)
            return super().raw_decode(*args)

    monkeypatch.setattr(json, "JSONDecoder", Counting)
    source = write(tmp_path, "a.json", json.dumps(["The lamp is lit. " * 6000]))
    assert len(texts_of(source, chunk_bytes=100)) == 1
    assert 9 <= len(calls) <= 13  # each time on twice as much


@pytest.mark.parametrize("chunk_bytes", [7, 90])
def test_a_row_of_json_that_is_too_long_is_named(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(rows, "LONGEST_ROW", 100)
    good = '{"text": "a"}\n{"text": "b"}\n'
    for name in ("a.jsonl", "a.json"):
        source = write(tmp_path, name, good + '{"text": "' + "x" * 300)
        with pytest.raises(InputError, match=rf"{name}:row 3 has more than 100 characters.*\.txt"):
            documents_of(source, chunk_bytes=chunk_bytes)
        source = write(tmp_path, name, good * 50)
        assert texts_of(source, chunk_bytes=chunk_bytes) == ["a", "b"] * 50
