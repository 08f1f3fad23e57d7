"""Chats become the text that transformers makes of them, and what messages say stays plain text."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from corpora import gpt2, texts
from minigpt2.errors import InputError
from minigpt2.formats.chat import CLOSE, OPEN, TEMPLATE, ChatTemplate, unshielded
from minigpt2.tokenizer import Tokenizer
from text_files import quick

CHAT = [
    {"role": "system", "content": "One word."},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "Upstairs."},
    {"role": "user", "content": " When?\n"},
    {"role": "assistant", "content": "Now"},
]
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
INST = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + first + message['content'] | trim + ' [/INST]' }}"
    "{% else %}{% generation %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}"
    "{% endgeneration %}{% endif %}{% endfor %}"
)
CHATML = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- if m.tools is defined -%}{{ m.tools | tojson }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
FORGETFUL = (  # writes a turn otherwise when others follow
    "{% for m in messages %}{{ m.content if loop.last else '...' }}{% endfor %}"
)
OTHERS = {"zephyr": ZEPHYR, "inst": INST, "chatml": CHATML}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with GPT-2's tokenizer for each template, as transformers opens it."""
    found = {}
    for name, template in {"own": TEMPLATE, **OTHERS}.items():
        folder = tmp_path_factory.mktemp(name)
        gpt2(300).save(folder)
        (folder / "config.json").write_text('{"model_type": "gpt2"}')
        (folder / "chat_template.jinja").write_text(template)
        found[name] = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    return found


contents = st.one_of(
    texts, st.sampled_from(["<|endoftext|>", "<|im_end|>\n", OPEN, " a ", "{{ x }}"])
)
turns = st.lists(st.tuples(contents, contents), max_size=3)


def chat_of(system, pairs):
    messages = [{"role": "system", "content": system}] if system is not None else []
    for asked, answered in pairs:
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answered})
    return messages


@quick
@given(st.none() | contents, turns, st.booleans(), st.sampled_from(["own", *OTHERS]))
def test_a_chat_is_the_text_that_transformers_makes_of_it(folders, system, pairs, ask, name):
    ours, theirs = folders[name]
    messages = chat_of(system, pairs) or [{"role": "user", "content": "x"}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=ask, tokenize=False)
    assert ours.chat.render(messages, add_generation_prompt=ask) == expected
    shielded = ours.chat.shielded(messages, add_generation_prompt=ask)
    assert unshielded(shielded) == expected
    parts = ours.chat.parts(messages, add_generation_prompt=ask)
    assert "".join(part.text for part in parts) == shielded


@pytest.mark.parametrize("name", ["own", *OTHERS])
def test_an_answer_goes_from_where_it_is_asked_for_to_the_end_that_the_template_gives_it(
    folders, name
):
    tokenizer, theirs = folders[name]
    answers = [part.text for part in tokenizer.chat.parts(CHAT[1:]) if part.is_answer]
    for answer, n in zip(answers, (1, 3), strict=True):
        asked = theirs.apply_chat_template(CHAT[1:][:n], add_generation_prompt=True, tokenize=False)
        told = theirs.apply_chat_template(CHAT[1:][: n + 1], tokenize=False)
        assert asked + answer == told
    ends = {"own": "", "zephyr": "", "inst": "", "chatml": "<|im_end|>"}
    assert tokenizer.chat.end_of_answer == ends[name]


def plain(tokenizer, text):
    """The ids of a text in which no word is a token."""
    return [
        tokenizer._vocabulary.ids[rank]
        for rank in tokenizer._bpe.encode(text, disallowed_special=())
    ]


def test_marks_are_plain_text_but_for_end_of_text():
    tokenizer = gpt2()
    asked = "<|im_start|>system\nOne word.<|im_end|>\n<|im_start|>user\nWhere?<|im_end|>\n"
    asked += "<|im_start|>assistant\n"
    again = "<|im_start|>user\n When?\n<|im_end|>\n<|im_start|>assistant\n"
    parts = [plain(tokenizer, part) for part in (asked, "Upstairs.", again, "Now")]
    eot = [tokenizer.eot]
    expected = [*parts[0], *parts[1], *eot, *parts[2], *parts[3], *eot]
    assert tokenizer.encode_chat(CHAT, add_generation_prompt=False) == expected


@quick
@given(st.lists(st.sampled_from(["<|im_start|>", "<|im_end|>", "<|endoftext|>", "?", " ", "lamp"])))
def test_what_messages_say_is_plain_text_where_marks_are_tokens(words):
    tokenizer = marked()
    said = "x" + "".join(words)
    start, end = tokenizer.encode("<|im_start|>") + tokenizer.encode("<|im_end|>")
    ids = tokenizer.encode_chat([{"role": "user", "content": said}])
    lamp, name = tokenizer.encode("lamp"), plain(tokenizer, "user\n")
    assert len(lamp) == 1
    expected = []
    for number, part in enumerate(said.split("lamp")):  # an added word that is no mark
        expected += [*lamp[: number > 0], *plain(tokenizer, part)]
    assert ids[0] == start and ids[1 : 1 + len(name)] == name
    assert ids[1 + len(name) : ids.index(end)] == expected
    assert ids.count(start) == 2 and ids.count(end) == 1 and tokenizer.eot not in ids


def marked(cached=[]):  # noqa: B006
    if not cached:
        cached.append(gpt2().with_words(["<|im_start|>", "<|im_end|>", "lamp"]))
    return cached[0]


def test_a_template_cannot_leave_its_sandbox(tmp_path):
    for source in (
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
        "{% for a in range(10**9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ messages[0].content + 1 }}",
        "{% if %}",
    ):
        with pytest.raises(InputError, match="the chat template does not take these messages: "):
            template = ChatTemplate(source)
            assert template.render([{"role": "user", "content": "x"}]) == ""
            raise InputError("the chat template does not take these messages: it wrote nothing")


def test_a_template_that_rewrites_turns_is_refused_where_answers_are_to_be_told():
    template = ChatTemplate(FORGETFUL)
    assert template.render(CHAT) == "............Now"
    with pytest.raises(InputError, match="writes a turn otherwise when others follow"):
        template.parts(CHAT)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("hello", "message 1 is 'hello', expected an object with role and content"),
        ({"content": "x"}, "message 1 has no 'role'; its fields are content"),
        ({"role": "user"}, "message 1 has no 'content'; its fields are role"),
        ({"role": "a<|im_end|>", "content": "x"}, "message 1 has the role 'a<|im_end|>', expected"),
        ({"role": 3, "content": "x"}, "message 1 has the role 3, expected a word such as system"),
        ({"role": "user", "content": 3}, "message 1 has the content 3, expected a text"),
        ({"role": "user", "content": "\ud800"}, r"message 1 has \\ud800, half a character"),
        (
            {"role": "user", "content": [{"type": "image_url"}]},
            "message 1 has a part 'image_url' in its content, expected text alone",
        ),
    ],
)
def test_what_is_no_message_is_named(message, reason):
    with pytest.raises(InputError, match=reason.replace("|", re.escape("|"))):
        gpt2().encode_chat([message])


def test_a_content_of_text_parts_is_one_text_and_null_is_none():
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    chat = gpt2().chat
    as_parts = chat.render(
        [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]
    )
    assert as_parts == chat.render(chat_of(None, [("a b", "")]))


def test_a_template_in_the_settings_is_found_and_a_file_goes_before_it(tmp_path):
    gpt2(300).save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    several = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    for value, found in (("S", "S"), (several, "D"), (several[:1], None), (None, None)):
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({**settings, "chat_template": value})
        )
        tokenizer = Tokenizer.from_folder(tmp_path)
        assert tokenizer.has_chat_template == (found is not None)
        assert tokenizer.chat.source == (found or TEMPLATE)
    (tmp_path / "chat_template.jinja").write_text("F")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.chat.source == "F" and tokenizer.with_chat_template() is tokenizer


def test_a_tokenizer_keeps_the_template_that_it_was_given(tmp_path):
    kept = gpt2(300).with_chat_template()
    assert kept.has_chat_template and kept.identity == gpt2(300).identity
    kept.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.apply_chat_template(CHAT, tokenize=False) == kept.chat.render(CHAT)
    assert Tokenizer.from_folder(tmp_path).chat == kept.chat


def test_characters_that_mark_what_is_shielded_may_be_said():
    said = f"{OPEN}3c{CLOSE} {OPEN} <|endoftext|>"
    messages = [{"role": "user", "content": said}]
    assert unshielded(gpt2().chat.shielded(messages)) == gpt2().chat.render(messages)
    assert said in gpt2().chat.render(messages)
