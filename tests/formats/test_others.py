"""Folders as other programs read them: every fact that llama.cpp's converter, CTranslate2's, and
transformers' tokenizers and pipeline take from one.
"""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast, pipeline

from minigpt2.formats.llama_cpp import refusals
from minigpt2.model import GPT2, GPT2Config
from minigpt2.tokenizer import Tokenizer
from scripts import run_here, tiny_folder

# the converter knows a vocabulary by the ids of a text of this kind: blanks, digits, scripts, marks
WILD = " ".join(
    [
        "\n\n \t\t  \n lamp   lamps    \n",
        "7 77 777 7777 77777 7.7 7..7 7...7",
        "\u4f60\u597dtea\u8336 \u0441\u0432\u0435\u0442 \u03c6\u03ce\u03c2 \u0e41\u0e2a\u0e07",
        "\U0001f642\u200d\U0001f4a1 \u2713 \U0001f6a2\U0001f6a2",
        "we're, We'D, it'll 'tis 'S  ???!!! ------ ====== ``",
    ]
)
SIZES = {"n_embd": 14, "n_layer": 2, "n_head": 2, "n_positions": 23, "n_ctx": 23}
OF_A_BLOCK = {
    "ln_1": (14,), "ln_2": (14,), "attn.c_attn": (14, 42), "attn.c_proj": (14, 14),
    "mlp.c_fc": (14, 56), "mlp.c_proj": (56, 14),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with GPT-2's own vocabulary, as `save_pretrained` writes it."""
    path = tmp_path_factory.mktemp("saved")
    config = GPT2Config(vocab_size=50257, block_size=23, n_embd=14, n_layer=2, n_head=2)
    model = GPT2(config, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(path, Tokenizer.gpt2())
    return path


def test_llama_cpp_finds_the_sizes_under_the_names_that_it_reads(folder):
    values = json.loads((folder / "config.json").read_text())
    assert values["architectures"] == ["GPT2LMHeadModel"]
    assert {name: values[name] for name in SIZES} == SIZES
    assert values["vocab_size"] == 50257 and values["layer_norm_epsilon"] == 1e-5


def test_llama_cpp_finds_the_tensors_that_it_maps_as_in_gpt2(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    expected = {"wte.weight": (50257, 14), "wpe.weight": (23, 14)}
    expected |= {"ln_f.weight": (14,), "ln_f.bias": (14,)}
    for layer in range(2):
        for name, shape in OF_A_BLOCK.items():
            expected[f"h.{layer}.{name}.weight"] = shape
            expected[f"h.{layer}.{name}.bias"] = shape[-1:]
    assert found == expected


def test_llama_cpp_knows_the_vocabulary_by_the_ids_of_a_wild_text(folder, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(folder / name, tmp_path)
    by_files_alone = GPT2TokenizerFast.from_pretrained(tmp_path).encode(WILD)
    assert AutoTokenizer.from_pretrained(folder).encode(WILD) == by_files_alone
    assert by_files_alone == Tokenizer.gpt2().encode(WILD)
    assert Tokenizer.from_folder(folder).is_gpt2s and not Tokenizer.gpt2(300).is_gpt2s


def test_llama_cpp_finds_tokens_merges_and_roles_in_the_tokenizers_files(folder):
    whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert whole["model"]["type"] == "BPE" and whole["model"]["merges"] == lines[1:]
    assert whole["model"]["vocab"] == json.loads((folder / "vocab.json").read_text())
    (word,) = whole["added_tokens"]
    assert (word["content"], word["id"], word["special"]) == ("<|endoftext|>", 50256, True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert {settings[f"{role}_token"] for role in ("bos", "eos", "unk")} == {"<|endoftext|>"}
    values = json.loads((folder / "config.json").read_text())
    assert values["bos_token_id"] == values["eos_token_id"] == 50256


def test_a_conversion_says_what_llama_cpp_cannot_take(capsys, folder, tmp_path):
    done = run_here(capsys, "convert_weights", folder, tmp_path / "gpt2s")
    assert done.code == 0 and "llama.cpp" not in done.err
    tiny = tiny_folder(tmp_path / "tiny")
    done = run_here(capsys, "convert_weights", tiny, tmp_path / "other")
    assert "llama.cpp's converter has no such model as" in done.err
    assert done.code == 0 and "its vocabulary is not GPT-2's" in done.err


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"n_inner": 57}, "n_inner is 57, not 4 n_embd"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"scale_attn_weights": False}, "scale_attn_weights is false"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true"),
        ({"architectures": ["GPT2Model"]}, "architectures is ['GPT2Model']"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_a_reason(folder, values, reason):
    config = json.loads((folder / "config.json").read_text())
    ok = {"n_rows": 50257, "n_ids": 50257, "gpt2s_vocabulary": True}
    assert refusals(config, **ok) == []
    assert refusals({**config, **values}, **ok) == [reason]
    assert refusals(config, **{**ok, "n_ids": 50258}) == [
        "its tokenizer has 50258 ids, the model 50257 rows"
    ]
    assert refusals(config, **{**ok, "n_ids": None}) == ["it has no tokenizer"]


def test_ctranslate2_finds_what_it_reads(folder):
    """ctranslate2.converters.transformers, GPT2Loader: transformers' model and three roles."""
    hf = AutoTokenizer.from_pretrained(folder)
    assert hf.bos_token == hf.eos_token == hf.unk_token == "<|endoftext|>"
    assert len(hf.get_vocab()) == 50257


@pytest.mark.filterwarnings("error")
def test_transformers_takes_the_folder_without_a_warning(folder, capfd, caplog):
    ids = Tokenizer.gpt2().encode("The lamp ")
    for kind in (AutoTokenizer, PreTrainedTokenizerFast, GPT2TokenizerFast):
        hf = kind.from_pretrained(folder)
        assert hf.is_fast and hf.model_max_length == 23 and hf.encode("The lamp ") == ids
    write = pipeline("text-generation", model=str(folder), device="cpu")
    (row,) = write("The lamp ", max_new_tokens=5, do_sample=False)
    ours = GPT2.from_pretrained(folder)
    expected = list(ids)
    for _ in range(5):
        expected.append(int(ours(torch.tensor([expected]))[0, -1].argmax()))
    assert row["generated_text"] == Tokenizer.gpt2().decode(expected)
    said = capfd.readouterr().err + caplog.text
    assert "warn" not in said.lower() and "[transformers]" not in said, said
