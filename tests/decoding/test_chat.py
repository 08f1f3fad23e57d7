"""A conversation is remembered as long as it fits into the window."""

import logging

import pytest

from corpora import gpt2
from minigpt2.decoding.chat import Conversation
from minigpt2.errors import InputError
from minigpt2.formats.chat import TEMPLATE

LOUD = "{% if messages[-1].content == 'x' %}{{ raise_exception('no x') }}{% endif %}" + TEMPLATE


def roles_and_texts(conversation):
    return [(message["role"], message["content"]) for message in conversation.messages]


def test_what_was_said_is_asked_with_the_next_question():
    conversation = Conversation(gpt2(), block_size=1024, max_new_tokens=200)
    first = conversation.ask("Where?")
    conversation.answered("Here.")
    second = conversation.ask("When?")
    said = [{"role": "user", "content": "Where?"}]
    assert first == gpt2().encode_chat(said)
    said += [{"role": "assistant", "content": "Here."}, {"role": "user", "content": "When?"}]
    assert second == gpt2().encode_chat(said)
    assert second[: len(first)] == first


def test_the_oldest_turns_are_forgotten_and_it_is_said(caplog):
    caplog.set_level(logging.INFO)
    conversation = Conversation(gpt2(), block_size=128, max_new_tokens=40)
    conversation.messages.append({"role": "system", "content": "Be brief."})
    for number in range(12):
        ids = conversation.ask(f"question {number}")
        assert len(ids) <= 128 - 40
        conversation.answered(f"answer {number}")
        system, *others = roles_and_texts(conversation)
        assert system == ("system", "Be brief.")
        first = number + 1 - len(others) // 2  # the newest are there, in their order
        expected = [
            (role, f"{what} {n}")
            for n in range(first, number + 1)
            for role, what in (("user", "question"), ("assistant", "answer"))
        ]
        assert others == expected
    assert first > 0
    assert caplog.messages[-1] == (
        "the conversation no longer fits into the model's 128 tokens: its oldest turn is forgotten"
    )
    caplog.clear()
    conversation.ask("long " * 60)
    assert "oldest turns are forgotten" in caplog.messages[-1]


def test_a_question_that_is_too_long_alone_is_asked_alone():
    conversation = Conversation(gpt2(), block_size=64, max_new_tokens=200)
    conversation.ask("Where?")
    conversation.answered("Here.")
    assert len(conversation.ask("long " * 100)) > 64
    assert roles_and_texts(conversation) == [("user", "long " * 100)]


def test_a_question_without_an_answer_and_one_that_is_refused_are_forgotten():
    loud = gpt2().with_chat_template()
    loud._vocabulary.templates["chat_template.jinja"] = LOUD  # pyright: ignore
    conversation = Conversation(loud, block_size=1024, max_new_tokens=200)
    conversation.ask("Where?")
    conversation.answered("")
    assert conversation.messages == []
    with pytest.raises(InputError, match="no x"):
        conversation.ask("x")
    assert conversation.messages == []
