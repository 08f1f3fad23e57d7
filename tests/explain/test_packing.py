import json
from base64 import b64decode

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from minigpt2.explain.packing import lower_triangle, packed, script_json


@given(st.text() | st.dictionaries(st.text(), st.lists(st.text())))
def test_json_in_a_script_is_never_markup_and_says_the_same(value):
    text = script_json(value)
    assert not set(text) & set("<>&\u2028\u2029\x7f")
    assert json.loads(text) == value


def test_numbers_are_packed_low_byte_first():
    values = torch.tensor([[0.0, 1.0], [0.25, 1 / 3]])
    kinds = {"f32": ("<f4", 1e-7), "f16": ("<f2", 1e-3), "share": ("<u2", 1e-5)}
    for kind, (code, tolerance) in kinds.items():
        found = packed(values, kind)
        assert (found["kind"], found["shape"]) == (kind, [2, 2])
        numbers = np.frombuffer(b64decode(str(found["data"])), code).astype("f8")
        numbers = numbers / 65535 if kind == "share" else numbers
        assert np.abs(numbers - values.flatten().double().numpy()).max() < tolerance
    assert b64decode(str(packed(torch.tensor([1, 258]), "i32")["data"])) == b"\1\0\0\0\2\1\0\0"


def test_of_a_square_the_lower_half_is_taken_row_by_row():
    square = torch.arange(18).reshape(2, 3, 3)
    assert lower_triangle(square).tolist() == [[0, 3, 4, 6, 7, 8], [9, 12, 13, 15, 16, 17]]
