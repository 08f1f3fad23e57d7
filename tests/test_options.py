"""Options: every flag reaches its field, and what makes no sense is refused by name."""

import dataclasses

import pytest

from minigpt2.console import parse
from minigpt2.errors import InputError
from minigpt2.options import (
    ConvertOptions,
    SampleOptions,
    SamplingConfig,
    TextConfig,
    TrainConfig,
    TrainOptions,
    flag,
)

CONTRACT = {
    TrainOptions: "data val-data val-fraction model preset out resume epochs max-steps "
    "batch-size micro-batch-size block-size learning-rate warmup-steps weight-decay grad-clip "
    "dropout eval-every "
    "save-every patience seed device dtype compile activation-checkpointing lora-rank lora-alpha "
    "merge-lora fsdp tensorboard document-mask mask-prompt workers text-field document-separator "
    "normalize-unicode normalize-newlines remove-control-characters duplicates min-characters",
    SampleOptions: "prompt prompt-file model max-new-tokens temperature top-k top-p min-p "
    "repetition-penalty num-samples seed stop device dtype json interactive no-repeat-ngram "
    "prompts-file finish-sentence ban guess draft compile",
}


@pytest.mark.parametrize("options_class", CONTRACT, ids=lambda c: c.__name__)
def test_the_documented_flags_exist(options_class, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(options_class, ["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for name in CONTRACT[options_class].split():
        assert f"--{name}" in shown


def test_every_sampling_flag_reaches_its_field():
    given = ["--temperature", "0.5", "--top-k", "7", "--top-p", "0.9", "--min-p", "0.1"]
    given += ["--repetition-penalty", "1.3", "--no-repeat-ngram", "3"]
    options = parse(SampleOptions, ["--prompt", "x", *given])
    expected = SamplingConfig(
        temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, repetition_penalty=1.3, no_repeat_ngram=3
    )
    assert options.sampling == expected


@pytest.mark.parametrize(
    ("given", "understood"),
    [
        ("---", "---"),
        (r"\n\n", "\n\n"),
        (r"a\tb\r\\n", "a\tb\r\\n"),
        (r"\d+", r"\d+"),
        (None, None),
    ],
)
def test_the_escapes_of_a_separator_are_understood(given, understood):
    assert TextConfig(document_separator=given).separator == understood


@pytest.mark.parametrize(
    "wrong", [{"min_characters": -1}, {"document_separator": ""}, {"text_field": ""}]
)
def test_text_settings_that_make_no_sense_are_refused_by_name(wrong):
    (name,) = wrong
    with pytest.raises(InputError, match=flag(name)):
        TextConfig(**wrong)


def test_every_training_flag_reaches_its_field():
    values = {
        "max_steps": 3,
        "batch_size": 5,
        "micro_batch_size": 2,
        "block_size": 11,
        "learning_rate": 0.25,
        "warmup_steps": 0,
        "weight_decay": 0.5,
        "grad_clip": 0.0,
        "eval_every": 7,
        "save_every": 13,
        "patience": 17,
        "seed": 19,
    }
    flags = [part for name, value in values.items() for part in (flag(name), str(value))]
    options = parse(TrainOptions, ["--data", "a.txt", "b", *flags])
    assert options.data == ("a.txt", "b")
    assert dataclasses.asdict(options.training) == {**values, "epochs": None}


def test_convert_takes_source_and_dest_by_position():
    options = parse(
        ConvertOptions, ["here", "there", "--dtype", "float16", "--force"], positional=True
    )
    assert (options.source, options.dest, options.dtype, options.force) == (
        "here",
        "there",
        "float16",
        True,
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 1.5),
        ("top_p", -0.1),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
    ],
)
def test_sampling_values_outside_their_range_are_refused_by_name(field, value):
    with pytest.raises(InputError, match=f"{flag(field)} is {value}, allowed is "):
        SamplingConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("learning_rate", 0.0),
        ("batch_size", 0),
        ("micro_batch_size", 0),
        ("block_size", 0),
        ("max_steps", 0),
        ("epochs", 0),
        ("eval_every", 0),
        ("save_every", -3),
        ("warmup_steps", -1),
        ("weight_decay", float("nan")),
        ("grad_clip", -1.0),
        ("patience", -1),
        ("seed", -1),
    ],
)
def test_training_values_outside_their_range_are_refused_by_name(field, value):
    with pytest.raises(InputError, match=f"{flag(field)} is {value}, allowed is "):
        TrainConfig(**{field: value})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "x", "--learning-rate", "abc"], "--learning-rate.*abc"),
        (["--data", "x", "--learning-rate", "-1"], "--learning-rate is -1.0, allowed is above 0"),
        (["--data", "x", "--learning-rat", "1"], "--learning-rat"),
        (["--data", "x", "--learning-rate"], "--learning-rate"),
        (["--data", "x", "--dtype", "int8"], "int8.*float16"),
        (["--data", "x", "--preset", "huge"], "huge.*nano"),
        (["--data", "x", "--val-fraction", "1"], "--val-fraction is 1.0"),
        (["--data", "x", "--epochs", "1", "--max-steps", "2"], "choose one"),
        ([], "--data"),
        (["--data"], "--data is empty"),
    ],
)
def test_flags_that_make_no_options_are_refused_in_one_line(argv, message):
    with pytest.raises(InputError, match=message) as refusal:
        parse(TrainOptions, argv)
    assert "\n" not in str(refusal.value)
    assert "│" not in str(refusal.value)


@pytest.mark.parametrize("argv", [[], ["--prompt", "a", "--interactive"]])
def test_a_sample_needs_exactly_one_kind_of_prompt(argv):
    with pytest.raises(InputError, match="exactly one of --prompt"):
        parse(SampleOptions, argv)
