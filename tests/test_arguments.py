"""What callers give is taken for what it is, or refused in a line with parameter, value and what is
allowed.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch

from minigpt2.arguments import MOST_SHOWN, check_types, id_list, id_rows, texts, whole
from minigpt2.decoding.text import complete, stream, stream_text
from minigpt2.errors import OptionError
from minigpt2.evaluation.score import score, score_ids
from minigpt2.generate import generate
from minigpt2.model import GPT2, GPT2Config
from minigpt2.tokenizer import Tokenizer


def refusal(call, *arguments, **options):
    with pytest.raises(OptionError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value) and "--" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("three", [3, np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor([3])])
def test_a_whole_number_is_an_int_whoever_made_it(three):
    assert whole("n", three) == 3 and type(whole("n", three)) is int


@pytest.mark.parametrize("value", [1.0, np.float32(1), "1", b"1", True, None, [1], torch.ones(1)])
def test_what_is_no_whole_number_is_refused(value):
    assert refusal(whole, "n", value).startswith("n is ")
    assert refusal(whole, "n", value).endswith("allowed is a whole number")


def test_a_whole_number_has_a_least_value_or_none():
    assert whole("n", 0) == 0 and whole("n", -5, least=None) == -5
    assert refusal(whole, "n", -1) == "n is -1, allowed is 0 or more"
    assert refusal(whole, "n", 1, least=2) == "n is 1, allowed is 2 or more"


def test_one_text_is_a_list_of_one():
    assert texts("stop", "ab") == ("ab",)
    assert texts("stop", ["a", "b"]) == texts("stop", iter("ab")) == ("a", "b")
    assert texts("stop", ()) == ()
    assert refusal(texts, "stop", ["a", 5]) == "stop holds 5, allowed are texts"
    assert refusal(texts, "stop", None) == "stop holds None, allowed are texts"
    assert "stop holds" in refusal(texts, "stop", b"ab")


IDS = [3, 1, 2]
SAME_IDS = [IDS, tuple(IDS), iter(IDS), np.array(IDS, np.uint16), torch.tensor(IDS),
            torch.tensor(IDS, dtype=torch.int32), [np.int64(3), torch.tensor(1), 2]]  # fmt: skip


@pytest.mark.parametrize("ids", SAME_IDS, ids=lambda ids: type(ids).__name__)
def test_ids_are_ints_whoever_made_them(ids):
    found = id_list("ids", ids)
    assert found == IDS and {type(id) for id in found} == {int}


@pytest.mark.parametrize("one", [7, np.int64(7), torch.tensor(7)])
def test_one_id_is_a_list_of_one(one):
    assert id_list("ids", one) == [7]


@pytest.mark.parametrize(
    "ids",
    ["text", b"bytes", [1.0], ["1"], [True], [None], [[1]], None, 1.5, True,
     torch.ones(2), torch.ones(2, dtype=torch.bool), torch.ones(1, 2, dtype=torch.int64)],
    ids=str,
)  # fmt: skip
def test_what_are_no_ids_is_refused(ids):
    assert refusal(id_list, "ids", ids).startswith("ids ")


ROWS = [[3, 1], [2, 4]]
SAME_ROWS = [ROWS, tuple(map(tuple, ROWS)), np.array(ROWS), torch.tensor(ROWS),
             [torch.tensor(row) for row in ROWS], [np.array(row) for row in ROWS]]  # fmt: skip


@pytest.mark.parametrize("rows", SAME_ROWS, ids=lambda rows: type(rows).__name__)
def test_rows_are_lists_of_ints_whoever_made_them(rows):
    assert id_rows("rows", rows) == ROWS


def test_rows_of_one_id_and_of_none_are_rows():
    assert id_rows("rows", [torch.tensor([5]), torch.tensor([6])]) == [[5], [6]]
    assert id_rows("rows", [[], [1]]) == [[], [1]]
    assert id_rows("rows", []) == []


@pytest.mark.parametrize(
    "rows",
    [[1, 2, 3], torch.tensor([1, 2, 3]), np.arange(3), [[1], 2], [torch.tensor(1)], torch.tensor(5),
     5, None, "text", b"bytes", ["text"], [[1.5]], [["1"]], [[[1]]], {1: [2]},
     torch.ones(1, 2), torch.ones(1, 1, 2, dtype=torch.int64)],
    ids=str,
)  # fmt: skip
def test_what_are_no_rows_is_refused(rows):
    assert "rows" in refusal(id_rows, "rows", rows)


def test_one_row_alone_is_told_what_to_do():
    assert refusal(id_rows, "rows", [1, 2]).endswith("put one row into a list, [row]")


@dataclass(frozen=True)
class Options:
    count: int = 1
    perhaps: int | None = None
    share: float = 0.5
    switch: bool = False
    name: str = "a"
    kind: Literal["one", "two"] = "one"
    more: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_types(self)


def test_numbers_of_numpy_become_pythons():
    options = Options(count=np.int64(3), perhaps=np.int64(4), share=np.float32(0.5))
    assert options == Options(count=3, perhaps=4, share=0.5)
    assert {type(options.count), type(options.perhaps)} == {int} and type(options.share) is float
    assert type(Options(share=2).share) is int  # JSON writes what was given


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": "3"}, "count is '3', allowed is a whole number"),
        ({"count": 3.0}, "count is 3.0, allowed is a whole number"),
        ({"count": None}, "count is None, allowed is a whole number"),
        ({"count": True}, "count is True, allowed is a whole number"),
        ({"perhaps": "3"}, "perhaps is '3', allowed is a whole number"),
        ({"share": "0.5"}, "share is '0.5', allowed is a number"),
        ({"share": None}, "share is None, allowed is a number"),
        ({"switch": 1}, "switch is 1, allowed is True or False"),
        ({"name": b"a"}, "name is b'a', allowed is a text"),
        ({"kind": "three"}, "kind is 'three', allowed is one, two"),
    ],
)
def test_values_of_another_type_are_refused(values, message):
    assert refusal(Options, **values) == message


def test_a_long_value_is_cut():
    told = refusal(whole, "n", "x" * 10_000)
    assert len(told) < MOST_SHOWN + 60 and "..." in told


def test_the_name_of_a_model_or_tokenizer_in_its_place_is_told_how_to_load_it():
    tokenizer = Tokenizer.gpt2(300)
    model = GPT2(GPT2Config(vocab_size=300, block_size=8, n_embd=4, n_layer=1, n_head=1))
    told = "model is 'gpt2', allowed is a GPT2: GPT2.from_pretrained loads one"
    assert refusal(generate, "gpt2", [[1]], max_new_tokens=1) == told
    assert refusal(score_ids, "gpt2", [[1, 2]]) == told
    for function in (complete, stream, stream_text, score):
        assert refusal(function, "gpt2", tokenizer, "a") == told
        assert refusal(function, model, "gpt2", "a") == (
            "tokenizer is 'gpt2', allowed is a Tokenizer: Tokenizer.from_pretrained loads one"
        )
