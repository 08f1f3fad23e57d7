"""The model card: what the Hub reads in it, what it says, and whose file it is."""

import json
import math
from dataclasses import replace

import pytest

from minigpt2.runs.card import base_model, is_ours, model_card, signed, write_card
from minigpt2.runs.folder import RunFolder
from minigpt2.runs.record import Record, RunInfo
from run_records import metrics_of, run_folder

LINES = [
    {"step": 0, "val_loss": math.log(35)},
    {"step": 1, "loss": 3.4},
    {"step": 5, "loss": 3.1, "val_loss": math.log(21.4)},
    {"step": 10, "loss": 3.0, "val_loss": math.log(24)},
]
INFO = {
    "sessions": [
        {
            "command": "python train.py --data /home/alice/diary/letters.txt",
            "versions": {"minigpt2": "0.1.0", "torch": "2.13.0", "platform": "Linux alice-laptop"},
        }
    ],
    "model": {
        "source": "gpt2",
        "source_kind": "hub",
        "pretrained": True,
        "n_parameters": 124_439_808,
        "n_trained": 124_439_808,
        "lora_rank": None,
    },
    "data": {
        "paths": ["/home/alice/diary/letters.txt", "C:\\Users\\alice\\notes.md"],
        "val_paths": ["../secret/exam.txt"],
        "n_documents": 2,
        "n_characters": 231_402,
        "n_train_tokens": 64_107,
        "n_val_tokens": 7_123,
    },
    "settings": {"max_steps": 10, "batch_size": 8, "learning_rate": 5e-05, "dropout": 0.1},
}


def record_of(lines=LINES, info=INFO, **model):
    info = info | {"model": info.get("model", {}) | model}
    return Record("my-run", metrics_of(lines), info=RunInfo.from_json(info))


def loaded(record, tmp_path):
    """The card as the Hub's own client reads it."""
    hub = pytest.importorskip("huggingface_hub")
    path = tmp_path / "README.md"
    path.write_text(signed(model_card(record)), encoding="utf-8")
    return hub.ModelCard.load(path)


def test_the_hub_reads_what_the_model_is_and_how_well_it_does(tmp_path):
    data = loaded(record_of(), tmp_path).data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.base_model == "gpt2"
    assert data.tags == ["gpt2", "minigpt2"]
    assert data.license is None
    (result,) = data.eval_results
    assert data.model_name == "my-run"
    assert result.task_type == "text-generation"
    assert result.metric_type == "perplexity"
    assert result.metric_value == pytest.approx(21.4, abs=1e-4)
    assert result.dataset_name == "held-out text of letters.txt, notes.md"


def test_an_adapter_says_so_and_how_peft_loads_it(tmp_path):
    card = loaded(record_of(lora_rank=8, n_trained=294_912), tmp_path)
    assert card.data.library_name == "peft"
    assert card.data.base_model == "gpt2"
    assert "lora" in card.data.tags
    assert "AutoPeftModelForCausalLM.from_pretrained" in card.text
    assert "LoRA adapters of rank 8, 294,912 of them trained" in card.text


def test_random_weights_have_no_base_model_and_were_never_untuned(tmp_path):
    card = loaded(record_of(source="nano", pretrained=False), tmp_path)
    assert card.data.base_model is None
    assert "trained from random weights" in card.text
    assert "untuned" not in card.text
    assert "English web pages" not in card.text


@pytest.mark.parametrize(
    "source", ["/home/alice/model", "./model", "~/model", "a/b/c", "", None, 3, "C:\\model"]
)
def test_a_local_folder_is_no_base_model(source):
    assert base_model(record_of(source=source)) is None


@pytest.mark.parametrize("source", ["gpt2", "someone/gpt2"])
def test_the_base_model_is_what_the_run_says_wherever_its_card_is_made(
    tmp_path, monkeypatch, source
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / source).mkdir(parents=True)
    assert base_model(record_of(source=source)) == source
    (tmp_path / source).rmdir()
    assert base_model(record_of(source=source, source_kind="folder")) is None


def test_a_run_that_does_not_say_what_its_source_was_has_only_a_public_base_model():
    for source in ("gpt2", "gpt2-xl", "distilgpt2", "openai-community/gpt2-medium"):
        assert base_model(record_of(source=source, source_kind=None)) == source
    for source in ("someone/gpt2", "runs/first", "my-gpt2"):
        assert base_model(record_of(source=source, source_kind=None)) is None


@pytest.mark.parametrize(
    ("source", "web"),
    [
        ("gpt2", True),
        ("distilbert/distilgpt2", True),
        ("openai-community/gpt2-xl", True),
        ("someone/gpt2", False),
        ("someone/distilgpt2", False),
    ],
)
def test_only_the_public_models_are_said_to_have_read_english_web_pages(source, web):
    card = model_card(record_of(source=source))
    assert ("trained on English web pages" in card) == web
    assert f"fine-tuned from [{source}]" in card


def test_no_path_no_command_and_no_machine_is_told():
    card = model_card(record_of(source="/home/alice/model"))
    for name in ("letters.txt", "notes.md", "exam.txt"):
        assert name in card
    for private in ("alice", "home", "diary", "Users", "secret", "laptop"):
        assert private not in card


def test_the_results_are_those_of_metrics():
    card = model_card(record_of())
    assert "**Result:** best at step 5: val perplexity 21.4 (untuned 35.0); after that" in card
    assert "| 0 | 3.5553 | 35.0 | untuned |" in card
    assert "| 5 | 3.0634 | 21.4 | **best** |" in card
    assert "| 10 | 3.1781 | 24.0 |  |" in card
    assert "| peak learning rate | 5e-05 |" in card
    assert "64,107 tokens trained on; 7,123 tokens from `exam.txt` to judge it." in card
    assert "With minigpt2 0.1.0, torch 2.13.0." in card


def test_bits_per_byte_stand_in_table_and_front_matter_where_they_are_known(tmp_path):
    bits = {0: 1.25, 5: 1.0771, 10: 1.1174}
    lines = [line | {"bits_per_byte": bits[line["step"]]} for line in LINES if "val_loss" in line]
    card = loaded(record_of(lines), tmp_path)
    assert "| step | loss (nats) | perplexity | bits per byte | |\n|---:|---:|---:|---:|---|\n" in (
        card.text
    )
    assert "| 0 | 3.5553 | 35.0 | 1.250 | untuned |" in card.text
    assert "| 5 | 3.0634 | 21.4 | 1.077 | **best** |" in card.text
    assert "whose tokenizers differ" in card.text
    perplexity, per_byte = card.data.eval_results
    assert (per_byte.metric_type, per_byte.metric_value) == ("bits_per_byte", 1.0771)
    assert perplexity.metric_type == "perplexity"
    assert "per byte" not in model_card(record_of())


def test_a_long_run_shows_some_evaluations_and_always_the_best():
    lines = [{"step": i, "val_loss": 3 + abs(i - 101) / 997} for i in range(1000)]
    card = model_card(record_of(lines))
    assert "41 of 1,000 evaluations" in card
    assert "| 101 | 3.0000 | 20.1 | **best** |" in card


@pytest.mark.parametrize(
    "lines",
    [
        [],
        LINES[:1],
        [{"step": 1, "loss": 3.0}],
        [{"step": 0, "val_loss": math.nan}, {"step": 5, "val_loss": math.inf}],
        [{"step": 0, "val_loss": 5000.0}],
        [{"val_loss": 3.0}, {"step": "x", "loss": None}],
    ],
)
@pytest.mark.parametrize(
    "info", [{}, *(dict.fromkeys(INFO, value) for value in (None, [None], 3, {"paths": [None]}))]
)
def test_the_hub_reads_the_card_of_any_run(tmp_path, lines, info):
    record = run_folder(tmp_path, lines, info=info).read_record()
    card = loaded(record, tmp_path)
    assert card.data.pipeline_tag == "text-generation"
    if not (lines and lines[0] == LINES[0]):
        assert card.data.eval_results is None


@pytest.mark.parametrize(
    "name",
    ['a: "b" #c', "- x\n---\n", "{[*&!|>%@`", "灯\u2028\x85\ufeff", "\ud800\x00\\u0041", "null"],
)
def test_names_of_any_kind_stay_names(tmp_path, name):
    data = INFO["data"] | {"paths": [name], "val_paths": [name]}
    record = replace(record_of(info=INFO | {"data": data}), name=name)
    card = loaded(record, tmp_path)
    assert len(card.data.eval_results) == 1
    assert isinstance(card.data.model_name, str)
    assert card.text.count("\n# ") + card.text.startswith("# ") == 1


def test_names_are_no_markup():
    name = "a`<script>|[b](c)**d"
    data = INFO["data"] | {"paths": [name], "val_paths": [name]}
    card = model_card(replace(record_of(info=INFO | {"data": data}), name=name))
    body = card.split("---\n", 2)[2]
    assert "# a script b (c) d\n" in body
    assert "`a script b (c) d`" in body
    assert "<script>" not in body
    assert body.replace("```", "").count("`") % 2 == 0


def run_with_card(path):
    run = RunFolder(path)
    for metrics in metrics_of(LINES[:3]):
        run.log(metrics)
    (path / "run.json").write_text(json.dumps(INFO), encoding="utf-8")
    write_card(run)
    return run, path / "README.md"


def test_our_own_card_is_renewed(tmp_path):
    run, path = run_with_card(tmp_path)
    old = path.read_text(encoding="utf-8")
    assert is_ours(old)
    run.log(*metrics_of(LINES[3:]))
    write_card(run)
    assert "| 10 | 3.1781 |" in path.read_text(encoding="utf-8")
    assert "| 10 | 3.1781 |" not in old


def test_our_own_card_is_known_with_windows_line_ends(tmp_path):
    run, path = run_with_card(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    write_card(run)
    assert b"\r" not in path.read_bytes()


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("21.4", "21.3", 1),
        lambda text: text + "More.\n",
        lambda text: "# Mine\n" + text,
        lambda text: "# Mine\n",
        lambda text: "",
    ],
)
def test_a_card_that_somebody_edited_is_left_alone(tmp_path, edit):
    run, path = run_with_card(tmp_path)
    theirs = edit(path.read_text(encoding="utf-8"))
    path.write_text(theirs, encoding="utf-8")
    write_card(run)
    assert path.read_text(encoding="utf-8") == theirs


def test_a_readme_that_is_no_text_is_left_alone(tmp_path):
    run, path = run_with_card(tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    write_card(run)
    assert path.read_bytes() == b"\xff\xfe\x00"
