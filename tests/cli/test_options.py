"""Options: every flag reaches its field, and what makes no sense is refused by name."""

import dataclasses

import pytest

from minigpt2.arguments import flag
from minigpt2.cli.console import parse
from minigpt2.cli.options import in_flags
from minigpt2.corpus.options import CorpusOptions, TextConfig, VocabularyOptions
from minigpt2.decoding.options import SampleOptions
from minigpt2.errors import InputError, OptionError
from minigpt2.formats.options import ConvertOptions
from minigpt2.sampling import SamplingConfig
from minigpt2.training.options import TrainConfig, TrainOptions

CONTRACT = {
    TrainOptions: "data val-data val-fraction model preset out resume epochs max-steps "
    "batch-size micro-batch-size block-size learning-rate warmup-steps weight-decay grad-clip "
    "dropout eval-every "
    "save-every patience seed device dtype compile activation-checkpointing lora-rank lora-alpha "
    "merge-lora fsdp tensorboard document-mask mask-prompt workers text-field document-separator "
    "normalize-unicode normalize-newlines remove-control-characters duplicates min-characters "
    "csv-columns csv-delimiter",
    SampleOptions: "prompt prompt-file model max-new-tokens temperature top-k top-p min-p "
    "repetition-penalty num-samples seed stop device dtype json interactive no-repeat-ngram "
    "prompts-file finish-sentence ban guess draft compile top-logprobs",
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
    ("given", "understood"),
    [
        (None, ()),
        ("a", ("a",)),
        ("b, a ", ("b", " a ")),
        ('"a, b",c d', ("a, b", "c d")),
        ('"say ""x""","two\nlines"', ('say "x"', "two\nlines")),
    ],
)
def test_the_columns_of_tables_are_a_line_of_csv(given, understood):
    assert TextConfig(csv_columns=given).columns == understood


def test_a_delimiter_is_a_character_or_a_tab_as_one_types_it():
    given = [None, ";", r"\t", "\t", "\\", "·"]
    assert [TextConfig(csv_delimiter=text).delimiter for text in given] == [
        None, ";", "\t", "\t", "\\", "·"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [{"min_characters": -1}, {"document_separator": ""}, {"text_field": ""}]
    + [{"csv_columns": names} for names in ("", "a,,b", "a,b,a", '"a', "a\nb", '"a"b')]
    + [{"csv_delimiter": text} for text in ("", ";;", '"', "\n", r"\n", "tab")],
)
def test_text_settings_that_make_no_sense_are_refused_by_name(wrong):
    (name,) = wrong
    with pytest.raises(InputError, match=name):
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
    with pytest.raises(InputError, match=f"^{field} is {value}, allowed is "):
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
    with pytest.raises(InputError, match=f"^{field} is {value}, allowed is "):
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
        (["--data"], "--data lacks its value"),
        (["--data", "--resume"], "--data lacks its value"),
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


ALWAYS = "always has an effect, or is refused where it has none by another test"
SITUATION = "said where the situation is known: minigpt2/plan.py, train.py, sample.py, corpus.py"
GREEDY = [(name, value) for name, value in (("temperature", 0), ("top-k", 1), ("top-p", 0))]
NO_TEXT = (["--max-new-tokens", "0"], "with --max-new-tokens 0 nothing is written but the prompt")


def greedy_but(own):
    """What makes a choice of tokens idle, other than the flag itself."""
    return [
        ([f"--{name}", str(value)], f"with --{name} {value} the likeliest token is always taken")
        for name, value in GREEDY
        if name != own
    ] + [NO_TEXT]


EQUAL = [
    ([f"--{name}", str(value)], f"with --{name} {value} all samples of a prompt are equal")
    for name, value in GREEDY
]
SAMPLE_FLAGS = {
    **dict.fromkeys(["prompt", "prompt_file", "prompts_file", "interactive", "model"], ALWAYS),
    **dict.fromkeys(["max_new_tokens", "finish_sentence", "json", "device", "dtype"], ALWAYS),
    "debug": ALWAYS,
    "num_samples": EQUAL,
    **{name: greedy_but(name) for name in ("seed", "temperature")},
    **{name: greedy_but(name.replace("_", "-")) for name in ("top_k", "top_p", "min_p")},
    **dict.fromkeys(["repetition_penalty", "no_repeat_ngram", "stop", "ban"], (NO_TEXT,)),
    **dict.fromkeys(["guess", "draft", "top_logprobs"], (NO_TEXT,)),
    "compile": [NO_TEXT],  # and SITUATION
    "cpu_routine": [NO_TEXT],
    "special_tokens": SITUATION,
}
TEXT_FLAGS = {
    **dict.fromkeys(["normalize_unicode", "normalize_newlines", "duplicates"], ALWAYS),
    **dict.fromkeys(["remove_control_characters", "min_characters"], ALWAYS),
    **dict.fromkeys(["text_field", "document_separator", "special_tokens"], SITUATION),
    **dict.fromkeys(["csv_columns", "csv_delimiter", "csv_plain_quotes"], SITUATION),
}
HELD_OUT = [(["--val-data", "y"], "--val-data is what is held out")]
TRAIN_FLAGS = {
    **TEXT_FLAGS,
    **dict.fromkeys(["data", "val_data", "model", "preset", "mask_prompt", "workers"], ALWAYS),
    **dict.fromkeys(["out", "resume", "dropout", "dtype", "compile", "add_tokens"], ALWAYS),
    **dict.fromkeys(["train_vocabulary", "vocab_size"], ALWAYS),
    **dict.fromkeys(["activation_checkpointing", "lora_alpha", "merge_lora", "fsdp"], ALWAYS),
    **dict.fromkeys(["tensorboard", "debug", "epochs", "max_steps", "block_size"], ALWAYS),
    **dict.fromkeys(["learning_rate", "weight_decay", "grad_clip", "seed"], ALWAYS),
    **dict.fromkeys(["document_mask", "device", "lora_rank", "batch_size"], SITUATION),
    **dict.fromkeys(["micro_batch_size", "warmup_steps", "eval_every", "save_every"], SITUATION),
    "patience": SITUATION,
    "val_fraction": HELD_OUT,
}
DECIDED = {
    SampleOptions: (SAMPLE_FLAGS, ["--prompt", "x"], False),
    TrainOptions: (TRAIN_FLAGS, ["--data", "x"], False),
    ConvertOptions: (
        dict.fromkeys(["source", "dest", "to", "dtype", "force", "debug"], ALWAYS), ["a", "b"], True
    ),
    CorpusOptions: (
        {
            **TEXT_FLAGS,
            **dict.fromkeys(["paths", "val_data", "model", "preset", "workers"], ALWAYS),
            **dict.fromkeys(["json", "debug"], ALWAYS),
            "val_fraction": HELD_OUT,
        }, ["x"], True
    ),
    VocabularyOptions: (
        {
            **TEXT_FLAGS,
            **dict.fromkeys(["paths", "out", "vocab_size", "val_data", "workers"], ALWAYS),
            **dict.fromkeys(["json", "debug"], ALWAYS),
            "val_fraction": HELD_OUT,
        }, ["x", "--out", "y"], True
    ),
}  # fmt: skip
WORDS = {"compile": [], "seed": ["0"], "top_p": ["0.5"], "min_p": ["0.5"], "temperature": ["0.5"]}
WORDS |= {
    "top_logprobs": ["2", "--json"],
    "stop": ["a"],
    "ban": ["a"],
    "draft": ["a"],
    "cpu_routine": ["plain"],
    "val_fraction": ["0.2"],
}
CASES = [
    (options_class, name, *case)
    for options_class, (flags, _, _) in DECIDED.items()
    for name, cases in flags.items()
    if not isinstance(cases, str)
    for case in cases
]


def fields_of(options_class):
    for field in dataclasses.fields(options_class):
        factory = field.default_factory
        inner = factory() if callable(factory) else None
        yield from fields_of(inner) if dataclasses.is_dataclass(inner) else [field.name]


@pytest.mark.parametrize("options_class", DECIDED, ids=lambda c: c.__name__)
def test_of_every_flag_it_is_decided_whether_it_may_have_no_effect(options_class):
    assert {*fields_of(options_class)} == {*DECIDED[options_class][0]}


@pytest.mark.parametrize(("options_class", "name", "beside", "reason"), CASES)
def test_a_flag_without_effect_is_said_in_one_line(options_class, name, beside, reason, caplog):
    _, enough, positional = DECIDED[options_class]
    words = [*enough, flag(name), *WORDS.get(name, ["2"]), *beside]
    parse(options_class, words, positional=positional)
    lines = [record.message for record in caplog.records]
    assert f"{flag(name)} changes nothing: {reason}" in lines


@pytest.mark.parametrize(
    "words",
    [
        "--temperature 0",
        "--temperature 0 --top-k 0 --top-p 1 --min-p 0 --num-samples 1 --no-json",
        "--max-new-tokens 0 --num-samples 3",
        "--max-new-tokens 0 --finish-sentence --seed 3",
        "--top-k 2 --top-p 0.5 --seed 3 --num-samples 4",
        "--draft a --guess 3 --num-samples 2",
    ],
)
def test_flags_that_have_an_effect_or_ask_for_none_are_passed_over(words, caplog):
    parse(SampleOptions, ["--prompt", "x", *words.split()])
    assert caplog.records == []


def test_several_flags_without_effect_for_one_reason_are_one_line(caplog):
    parse(SampleOptions, ["--prompt", "x", "--temperature", "0", "--top-k", "5", "--seed", "3"])
    assert [record.message for record in caplog.records] == [
        "--seed, --top-k change nothing: with --temperature 0 the likeliest token is always taken"
    ]


def test_under_torchrun_one_process_speaks(caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    parse(TrainOptions, ["--data", "x", "--val-data", "y", "--val-fraction", "0.3"])
    assert caplog.records == []


# parameters in the library, flags in the commands


def test_the_options_that_an_error_names_are_flags_for_who_typed_them():
    problem = OptionError(
        "top_p is 2: not top_p_more, a/top_p, top_p/b or top_p.bin; top_p.", "top_p"
    )
    told = "--top-p is 2: not top_p_more, a/top_p, top_p/b or top_p.bin; --top-p."
    assert in_flags(problem) == told
    assert in_flags(OptionError("give other val_paths", "val_paths")) == "give other --val-data"
    assert in_flags(OptionError("rank is 0", "rank")) == "--lora-rank is 0"


def test_what_is_no_flag_stays_as_it_is():
    for problem in (OptionError("n_layer is 0", "n_layer"), OptionError("text is 5", "text"),
                    InputError("top_p is 2"), OSError("seed")):  # fmt: skip
        assert in_flags(problem) == str(problem)


@pytest.mark.parametrize("options", [TextConfig, TrainConfig, SamplingConfig])
def test_options_of_another_type_are_refused(options):
    for field in dataclasses.fields(options):
        with pytest.raises(InputError, match=f"^{field.name} is .*5.*, allowed is "):
            options(**{field.name: ["5"]})
