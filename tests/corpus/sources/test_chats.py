"""Rows that are chats, in every format and under every name that people use."""

import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import pytest

from minigpt2.corpus.options import TextConfig
from minigpt2.corpus.sources.chats import chat_fields
from minigpt2.corpus.sources.documents import read_documents
from minigpt2.errors import InputError
from minigpt2.formats.chat import ChatTemplate, unshielded
from text_files import table, write

SYSTEM, USER, ASSISTANT = (f"<|im_start|>{role}\n" for role in ("system", "user", "assistant"))
END = "<|im_end|>\n"
MESSAGES = [
    {"role": "user", "content": "Where is “it”?"},
    {"role": "assistant", "content": "Here,\nor there."},
]
SHARED = [
    {"from": "human", "value": "Where is “it”?"},
    {"from": "gpt", "value": "Here,\nor there."},
]
ASKED, TOLD = f"{USER}Where is “it”?{END}{ASSISTANT}", "Here,\nor there."
KINDS = {
    "messages": ({"messages": MESSAGES}, ASKED),
    "conversations": ({"conversations": SHARED, "id": "a"}, ASKED),
    "conversations with roles": ({"conversations": MESSAGES}, ASKED),
    "system": ({"conversations": SHARED, "system": "Be brief."}, f"{SYSTEM}Be brief.{END}{ASKED}"),
    "instruction": ({"instruction": "Where is “it”?", "output": TOLD}, ASKED),
    "input": (
        {"instruction": "Find it.", "input": "A map", "output": TOLD},
        f"{USER}Find it.\n\nA map{END}{ASSISTANT}",
    ),
    "case and blanks": ({"Question": "Where is “it”?", " ANSWER ": TOLD}, ASKED),
    "prompt": ({"prompt": "Where is “it”?", "response": TOLD}, ASKED),
    "roles": (
        {"messages": [{**MESSAGES[0], "role": "Human"}, {"from": "BOT", "value": TOLD}]},
        ASKED,
    ),
    "null text": ({"text": None, "messages": MESSAGES}, ASKED),
    "empty text": ({"text": "", "question": "Where is “it”?", "answer": TOLD}, ASKED),
    "input and response": (
        {"instruction": "Find it.", "input": "A map", "response": TOLD},
        f"{USER}Find it.\n\nA map{END}{ASSISTANT}",
    ),
    "empty input": ({"instruction": "Where is “it”?", "input": "", "output": TOLD}, ASKED),
    "context": (
        {"instruction": "Find it.", "context": "A map", "response": TOLD, "category": "x"},
        f"{USER}Find it.\n\nA map{END}{ASSISTANT}",
    ),
    "question": ({"question": "Where is “it”?", "answer": TOLD}, ASKED),
}


def parquet(row):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), file)
    return file.getvalue()


def in_table(row):
    values = ["" if value is None else value for value in row.values()]
    return [v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]


FORMATS = {
    ".jsonl": lambda row: json.dumps(row),
    ".json": lambda row: json.dumps([row], indent=1),
    ".csv": lambda row: table([[*row], in_table(row)]),
    ".tsv": lambda row: table([[*row], in_table(row)], delimiter="\t"),
    ".parquet": parquet,
    ".jsonl.gz": lambda row: gzip.compress(json.dumps(row).encode()),
}


def turns_of(source, text=TextConfig(), chat=ChatTemplate()):  # noqa: B008
    """[(text, whether it asks), ...] of the chunks of a file's one document."""
    *chunks, last = read_documents(source, text, chat)
    assert last.is_last and last.text == "" and not any(chunk.is_last for chunk in chunks)
    assert all(chunk.shielded and chunk.row == 1 for chunk in [*chunks, last])
    return [(unshielded(chunk.text), chunk.prompt) for chunk in chunks]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", FORMATS)
def test_rows_of_every_kind_are_chats_in_every_format(tmp_path, kind, suffix):
    row, asked = KINDS[kind]
    source = write(tmp_path, f"a{suffix}", FORMATS[suffix](row))
    assert turns_of(source) == [(asked, True), (TOLD, False)]


def test_every_answer_but_the_last_ends_with_end_of_text_and_the_last_with_its_documents(tmp_path):
    row = {"messages": [*MESSAGES, {"role": "user", "content": "Really?"}, *MESSAGES[1:]]}
    expected = [(ASKED, True), (f"{TOLD}<|endoftext|>", False)]
    expected += [(f"{USER}Really?{END}{ASSISTANT}", True), (TOLD, False)]
    assert turns_of(write(tmp_path, "a.jsonl", json.dumps(row))) == expected
    row["messages"].append({"role": "user", "content": "Well?"})
    expected[-1] = (f"{TOLD}<|endoftext|>", False)
    expected.append((f"{USER}Well?{END}", True))
    assert turns_of(write(tmp_path, "b.jsonl", json.dumps(row))) == expected


def test_an_answer_that_says_end_of_text_keeps_it(tmp_path):
    row = {"question": "?", "answer": "<|endoftext|>"}
    source = write(tmp_path, "a.jsonl", json.dumps(row))
    assert turns_of(source)[-1] == ("<|endoftext|>", False)


def test_the_text_field_may_name_a_list_of_messages_of_any_name(tmp_path):
    source = write(tmp_path, "a.jsonl", json.dumps({"dialog": SHARED, "text": "x"}))
    assert turns_of(source, TextConfig(text_field="dialog")) == [(ASKED, True), (TOLD, False)]
    named = write(tmp_path, "b.csv", table([["messages"], ["plain text"]]))
    (chunk,) = read_documents(named, TextConfig(text_field="messages"))
    assert chunk[:3] == ("plain text", 1, True) and not chunk.shielded


def test_a_chat_of_no_messages_is_an_empty_document(tmp_path):
    for value in ([], None):
        (chunk,) = read_documents(
            write(tmp_path, "a.jsonl", json.dumps({"messages": value})), TextConfig()
        )
        assert (chunk.text, chunk.is_last) == ("", True)


def test_a_row_may_be_a_list_of_messages_itself(tmp_path):
    source = write(tmp_path, "a.jsonl", json.dumps(MESSAGES))
    assert turns_of(source) == [(ASKED, True), (TOLD, False)]


def test_text_and_prompts_with_completions_go_before_chats():
    row = {"text": "t", "prompt": "p", "completion": "c", "messages": MESSAGES}
    assert chat_fields(row) == ("messages",)
    from minigpt2.corpus.sources.rows import columns_of

    assert columns_of(row, "text") == ("text",)
    assert columns_of({k: row[k] for k in ("prompt", "completion", "messages")}, "text") == (
        "prompt",
        "completion",
    )
    all_of_it = {
        "answer": 1,
        "context": 2,
        "input": 3,
        "question": 4,
        "instruction": 5,
        "System": 6,
    }
    expected = ("System", "instruction", "question", "input", "context", "answer")
    assert columns_of(all_of_it, "text") == expected
    assert columns_of({"question": 1, "reply": 2}, "text") == ()


BAD = [
    ({"messages": "hello"}, "'messages' is 'hello', which is not JSON"),
    ({"messages": 5}, "'messages' is 5, allowed is a list of messages"),
    ({"messages": {"ok": "OK"}}, "'messages' is an object, allowed is a list of messages"),
    ({"messages": ["x"]}, "message 1 of 'messages' is 'x', allowed is an object with role and"),
    (
        {"messages": [*MESSAGES, {"text": "x"}]},
        "message 3 of 'messages' has no 'role' or 'from'; its fields are text",
    ),
    (
        {"conversations": [{"from": "human"}]},
        "message 1 of 'conversations' has no 'content' or 'value'; its fields are from",
    ),
    (
        {"conversations": [{"from": 3, "value": "x"}]},
        "message 1 of 'conversations' has the role 3, allowed are user, assistant, system",
    ),
    ({"messages": [{"role": "narrator", "content": "x"}]}, ".* the role 'narrator', allowed are"),
    (
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
        "message 1 has tool_calls, which our chat template cannot write",
    ),
    ({"question": "?", "answer": "a", "output": "b"}, "'output' and 'answer' are both answers"),
    (
        {"system": "a", "messages": [{"role": "system", "content": "b"}]},
        "the first message is of the system, and the field 'system' says something else",
    ),
    ({"messages": [{"role": "user", "content": 1}]}, "message 1 has the content 1, expected a tex"),
    ({"question": ["x"], "answer": "y"}, "'question' is \\['x'\\], allowed is a string"),
    ({"question": "\ud800", "answer": "y"}, "message 1 has \\\\ud800, half a character"),
    ({"messages": MESSAGES, "system": 4}, "'system' is 4, allowed is a string"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_what_is_no_chat_is_named_with_file_row_and_field(tmp_path, row, reason):
    source = write(tmp_path, "a.jsonl", "\n" + json.dumps(row))
    with pytest.raises(InputError, match=f"a\\.jsonl:row 2: {reason}"):
        list(read_documents(source, TextConfig()))


def test_what_the_template_refuses_is_named_with_file_and_row(tmp_path):
    template = ChatTemplate("{{ raise_exception('no system, please') }}")
    source = write(tmp_path, "a.jsonl", json.dumps({"messages": MESSAGES}))
    with pytest.raises(InputError, match=r"a\.jsonl:row 1: the chat template does not .*no system"):
        list(read_documents(source, TextConfig(), template))
