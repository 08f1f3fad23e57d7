"""Options from fields by name: whichever dataclass they are in, and one line for what is none."""

from pathlib import Path

import pytest

from minigpt2.corpus.options import TextConfig
from minigpt2.errors import InputError
from minigpt2.training.options import SETTINGS, TrainConfig, TrainOptions, options_from


def test_fields_find_their_dataclass_and_paths_may_be_one_or_many():
    values = {"data": Path("a.txt"), "val_data": ["b", Path("c")], "max_steps": 3, "out": Path("x")}
    expected = TrainOptions(
        data=("a.txt",),
        val_data=("b", "c"),
        out="x",
        text=TextConfig(min_characters=2),
        training=TrainConfig(max_steps=3),
    )
    assert options_from({**values, "min_characters": 2}) == expected
    assert {"max_steps", "lora_rank", "min_characters", "val_data"} <= {*SETTINGS}
    assert not {"data", "model", "out", "resume", "text", "training"} & {*SETTINGS}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learningrate": 1}, "there is no setting learningrate (did you mean learning_rate?)"),
        ({"zzz": 1}, "there is no setting zzz; train.py --help lists them"),
        ({"text": 1}, "there is no setting text"),
        ({"data": ["a", 3]}, "data is ['a', 3], allowed is a path, or several"),
        ({"lora_rank": "8"}, "lora_rank is '8', allowed is a whole number"),
        ({"compile": "yes"}, "compile is 'yes', allowed is True or False"),
        ({"dtype": "float8"}, "dtype is 'float8', allowed is auto, float32, bfloat16, float16"),
        ({"max_steps": 0}, "max_steps is 0, allowed is 1 or more"),
        ({"train_vocabulary": True}, "train_vocabulary is given without preset: the weights of a"),
        ({"vocab_size": 300, "model": "m"}, "vocab_size is given without preset: the weights of a"),
        ({"vocab_size": 256, "preset": "nano"}, "vocab_size is 256, allowed is 257 to 50257, or"),
        ({"vocab_size": 50258, "preset": "gpt2"}, "50258, allowed is 257 to 50257, or more with"),
        (
            {"vocab_size": 2**31, "preset": "gpt2", "train_vocabulary": True},
            "vocab_size is 2147483648, allowed is 257 to 2147483647",
        ),
    ],
)
def test_what_is_no_option_is_said_in_one_line(values, message):
    with pytest.raises(InputError) as caught:
        options_from({"data": "a.txt", **values})
    assert message in str(caught.value) and "\n" not in str(caught.value)
