"""Conversion changes the form, never a value, reads back to prove it, and refuses in one line."""

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open

from hf_models import TOLERANCE, copy_of, logit_difference, randomised, reference, tensors_of
from minigpt2.formats import tensors as tensor_files
from minigpt2.lora import adapters, add_lora, save_adapter
from minigpt2.model import GPT2
from minigpt2.tokenizer import Tokenizer
from scripts import run_alone, run_here, tiny_folder
from tokenizer_folders import END, preferring, small, whole, word, write
from vocabularies import hf_reads

SMALL = {"n_layer": 2, "n_positions": 16}
WRITTEN = ["config.json", "generation_config.json", "model.safetensors"]


@pytest.fixture
def convert(capsys):
    """A function that runs the script in this process."""

    def run(*argv):
        return run_here(capsys, "convert_weights", *argv)

    return run


@pytest.fixture
def source(hf_folder):
    return hf_folder(**SMALL)


def config_of(folder):
    """What config.json says, but for the name of n_positions that llama.cpp reads."""
    values = json.loads((folder / "config.json").read_text())
    assert values.pop("n_ctx", values["n_positions"]) == values["n_positions"]
    return values


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_same_tensors(folder, expected):
    found = tensors_of(folder)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def refused(result, *parts):
    """The script ended as it does for the user's mistakes, and its one line holds these parts."""
    assert result.code == 2 and result.out == ""
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
    assert all(str(part) in result.err for part in parts), result.err


def test_there_and_back_every_tensor_and_config_value_is_the_same(hf_folder, tmp_path):
    source, first, second = hf_folder(), tmp_path / "a" / "first", tmp_path / "second"
    result = run_alone("convert_weights", source, first)
    assert (result.code, result.out) == (0, "")
    assert result.last_line == f"{first}: 148 tensors written and read back equal"
    theirs = reference(first, torch.float32)
    assert theirs.dtype == torch.float32
    theirs.save_pretrained(tmp_path / "hf")
    assert run_alone("convert_weights", tmp_path / "hf", second).code == 0
    for folder in (first, second):
        assert names_in(folder) == WRITTEN
        assert_same_tensors(folder, tensors_of(source))
        assert config_of(folder) == config_of(source)
        assert logit_difference(folder) <= TOLERANCE
    with safe_open(first / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"} and "wte.weight" in file.keys()  # noqa: SIM118


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_kept_unless_asked_for(convert, source, tmp_path, dtype):
    name = str(dtype).removeprefix("torch.")
    tensors = {key: value.to(dtype) for key, value in tensors_of(source).items()}
    stored = copy_of(source, tmp_path / "stored", tensors, dtype=name)
    assert convert(stored, tmp_path / "kept").code == 0
    assert_same_tensors(tmp_path / "kept", tensors)
    assert config_of(tmp_path / "kept") == config_of(stored)
    assert reference(tmp_path / "kept", "auto").dtype == dtype


def test_tensors_of_different_dtypes_keep_each_its_own(convert, source, tmp_path):
    tensors = {key: value if "ln" in key else value.half()
               for key, value in tensors_of(source).items()}  # fmt: skip
    stored = copy_of(source, tmp_path / "stored", tensors)
    assert convert(stored, tmp_path / "kept").code == 0
    assert_same_tensors(tmp_path / "kept", tensors)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_dtype_asked_for_is_written_and_stated(convert, source, tmp_path, name):
    dtype = getattr(torch, name)
    tensors = {key: value.double() for key, value in tensors_of(source).items()}
    stored = copy_of(source, tmp_path / "stored", tensors, dtype="float64")
    assert convert(stored, tmp_path / "cast", "--dtype", name).code == 0
    cast = {key: value.to(dtype) for key, value in tensors.items()}
    assert_same_tensors(tmp_path / "cast", cast)
    assert config_of(tmp_path / "cast") == {**config_of(stored), "dtype": name}
    assert reference(tmp_path / "cast", "auto").dtype == dtype


def test_a_number_that_the_dtype_cannot_hold_is_named_and_nothing_is_written(
    convert, source, tmp_path
):
    tensors = tensors_of(source)
    tensors["ln_f.weight"] = torch.full_like(tensors["ln_f.weight"], 7e4)
    stored = copy_of(source, tmp_path / "stored", tensors)
    done = convert(stored, tmp_path / "cast", "--dtype", "float16")
    assert done.code == 2 and not (tmp_path / "cast").exists()
    assert (
        f"{stored}/model.safetensors: ln_f.weight holds 70000, which float16 cannot"
        in done.last_line
    )
    assert convert(stored, tmp_path / "cast", "--dtype", "bfloat16").code == 0


def test_a_dtype_is_stated_under_the_name_that_the_config_uses(convert, source, tmp_path):
    stored = copy_of(source, tmp_path / "stored", tensors_of(source), torch_dtype="float32")
    values = config_of(stored)
    del values["dtype"]
    (stored / "config.json").write_text(json.dumps(values))
    assert convert(stored, tmp_path / "cast", "--dtype", "float16").code == 0
    assert config_of(tmp_path / "cast") == {**values, "torch_dtype": "float16"}


def test_config_values_that_are_not_ours_are_kept(convert, source, tmp_path):
    extra = {"n_ctx": 16, "task_specific_params": {"a": [1, None]}, "summary_type": "mean"}
    stored = copy_of(source, tmp_path / "stored", tensors_of(source), **extra)
    assert convert(stored, tmp_path / "out").code == 0
    assert config_of(tmp_path / "out") == config_of(stored)


def test_how_texts_are_generated_is_kept(convert, source, tmp_path):
    stored = copy_of(source, tmp_path / "stored", tensors_of(source))
    values = {"eos_token_id": 3, "do_sample": True, "top_k": 7}
    (stored / "generation_config.json").write_text(json.dumps(values))
    assert convert(stored, tmp_path / "out").code == 0
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == values


def test_masks_and_a_tied_head_are_left_out(convert, source, tmp_path):
    tensors = tensors_of(source)
    more = {
        "h.0.attn.bias": torch.ones(1, 1, 16, 16).tril(),
        "h.1.attn.masked_bias": torch.tensor(-1e4),
        "lm_head.weight": tensors["wte.weight"].clone(),
    }
    stored = copy_of(source, tmp_path / "stored", {**tensors, **more})
    assert convert(stored, tmp_path / "out").code == 0
    assert_same_tensors(tmp_path / "out", tensors)
    assert config_of(tmp_path / "out") == config_of(source)


def test_a_head_of_its_own_is_kept_and_stated(convert, source, tmp_path):
    tensors = tensors_of(source)
    tensors["lm_head.weight"] = tensors["wte.weight"].flip(0).contiguous()
    stored = copy_of(source, tmp_path / "stored", tensors)
    assert convert(stored, tmp_path / "out").code == 0
    assert_same_tensors(tmp_path / "out", tensors)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert logit_difference(tmp_path / "out", length=16) <= TOLERANCE


def test_shards_become_one_file(convert, source, tmp_path):
    randomised(**SMALL).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(names_in(tmp_path / "shards")) > 4
    assert convert(tmp_path / "shards", tmp_path / "out").code == 0
    assert names_in(tmp_path / "out") == WRITTEN
    assert_same_tensors(tmp_path / "out", tensors_of(source))


def transposed_views(tensors):
    return {key: x.T.contiguous().T if x.dim() == 2 else x for key, x in tensors.items()}


def parameters(tensors):
    return {key: torch.nn.Parameter(x) for key, x in tensors.items()}


def views_of_one_storage(tensors):
    storage = torch.cat([x.flatten() for x in tensors.values()])
    parts = storage.split([x.numel() for x in tensors.values()])
    return {key: part.view(x.shape) for (key, x), part in zip(tensors.items(), parts)}


def one_tensor_twice(tensors):
    return {**tensors, "h.1.ln_1.weight": tensors["h.0.ln_1.weight"]}


@pytest.mark.parametrize(
    "form", [dict, transposed_views, parameters, views_of_one_storage, one_tensor_twice]
)
def test_a_pickle_is_rewritten_however_its_tensors_lie_in_memory(convert, source, tmp_path, form):
    stored, tensors = copy_of(source, tmp_path / "stored"), form(tensors_of(source))
    torch.save(tensors, stored / "pytorch_model.bin")
    assert convert(stored, tmp_path / "out").code == 0
    assert_same_tensors(tmp_path / "out", tensors)


def test_a_tokenizer_comes_along(convert, source, tmp_path):
    stored = copy_of(source, tmp_path / "stored", tensors_of(source))
    tokenizer = Tokenizer.gpt2(257)
    tokenizer.save(stored)
    assert convert(stored, tmp_path / "out").code == 0
    again = Tokenizer.from_folder(tmp_path / "out")
    assert again.encode("The sea, 日本.") == tokenizer.encode("The sea, 日本.")
    assert again.eot == tokenizer.eot


def test_a_folder_without_tokenizer_gives_one_without_and_says_so(convert, source, tmp_path):
    result = convert(source, tmp_path / "out")
    assert f"{source} has no tokenizer files, so {tmp_path / 'out'} has none either" in result.err
    assert names_in(tmp_path / "out") == WRITTEN


def test_an_existing_folder_is_refused_and_stays_as_it_was(convert, source, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    refused(convert(source, tmp_path), f"DEST {tmp_path} exists and is not empty: add --force")
    assert names_in(tmp_path) == ["notes.txt"]


def test_force_replaces_the_model_files_alone(convert, source, hf_folder, tmp_path):
    dest = copy_of(hf_folder(), tmp_path / "dest", tensors_of(hf_folder()))
    (dest / "notes.txt").write_text("mine")
    assert convert(source, dest, "--force").code == 0
    assert names_in(dest) == [*WRITTEN, "notes.txt"]
    assert_same_tensors(dest, tensors_of(source))
    assert config_of(dest) == config_of(source)


def test_an_empty_folder_needs_no_force(convert, source, tmp_path):
    (tmp_path / "out").mkdir()
    assert convert(source, tmp_path / "out").code == 0


def test_a_folder_can_be_converted_in_place(convert, source, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    refused(convert(folder, folder), "add --force")
    for _ in range(2):
        assert convert(folder, folder, "--force").code == 0
        assert names_in(folder) == WRITTEN
        assert_same_tensors(folder, tensors_of(source))
        assert config_of(folder) == config_of(source)


def test_a_file_in_place_of_dest_is_refused(convert, source, tmp_path):
    (tmp_path / "out").write_text("mine")
    refused(convert(source, tmp_path / "out"), f"DEST {tmp_path / 'out'} is a file: name a folder")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_dest_below_a_file_is_refused(convert, source, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    refused(convert(source, tmp_path / "notes.txt" / "out"), tmp_path / "notes.txt" / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_dest_that_cannot_be_written_is_refused(convert, source, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    refused(convert(source, tmp_path / "closed" / "out"), tmp_path / "closed")


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"n_layer": 3}, "n_layer is 3, there are layers 0 to 1"),
        ({"add_cross_attention": True}, "config.json"),
    ],
    ids=str,
)
def test_a_source_that_does_not_fit_writes_nothing(convert, source, tmp_path, values, part):
    stored = copy_of(source, tmp_path / "stored", tensors_of(source), **values)
    refused(convert(stored, tmp_path / "out"), stored, part)
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_no_model_is_refused(convert, source, tmp_path):
    pointer = copy_of(source, tmp_path / "pointer")
    (pointer / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(convert(pointer, tmp_path / "out"), pointer, "Git LFS pointer")
    refused(convert(tmp_path / "none", tmp_path / "out"), tmp_path / "none")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv", [[], ["a"], ["a", "b", "--to", "gguf"], ["a", "b", "--dtype", "x"]]
)
def test_arguments_that_make_no_sense_are_refused(convert, argv):
    refused(convert(*argv))


def flip_a_bit(tensors):
    name = next(iter(tensors))
    tensors[name] = tensors[name].clone()
    tensors[name].view(torch.uint8)[0, 0] ^= 1


def round_to_float16(tensors):
    for name, value in tensors.items():
        tensors[name] = value.half()


@pytest.mark.parametrize("damage", [flip_a_bit, round_to_float16])
def test_a_file_that_reads_back_otherwise_is_an_error(
    convert, source, tmp_path, monkeypatch, damage
):
    save_file = tensor_files.save_file

    def damaged(tensors, path, metadata):
        tensors = dict(tensors)
        damage(tensors)
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(tensor_files, "save_file", damaged)
    result = convert(source, tmp_path / "out")
    assert result.code == 2
    assert result.last_line.startswith(f"error: {tmp_path / 'out'}: ")
    assert "does not read back as it was written" in result.last_line


def test_values_that_are_not_numbers_read_back_equal_too(convert, source, tmp_path):
    tensors = tensors_of(source)
    tensors["wpe.weight"][3, 5] = float("nan")
    stored = copy_of(source, tmp_path / "stored", tensors)
    assert convert(stored, tmp_path / "out").code == 0
    same = tensors_of(tmp_path / "out")["wpe.weight"].view(torch.int32)
    assert torch.equal(same, tensors["wpe.weight"].view(torch.int32))


def test_in_place_a_conversion_keeps_every_setting_of_the_tokenizer(
    convert, tmp_path, tmp_path_factory
):
    vocab, merges = small(tmp_path_factory)
    words = {299: word(END), 300: word("<|start|>"), 301: word("paradox", special=False)}
    preferring([64], 301).save_pretrained(tmp_path)  # no row for the last word
    write(
        tmp_path,
        vocab={**vocab, END: 299},
        merges=merges,
        tokenizer=whole(({**vocab, END: 299}, merges), words),
        added_tokens={"<|start|>": 300, "paradox": 301},
        special_tokens_map={"bos_token": "<|start|>", "eos_token": END, "pad_token": "<|start|>"},
        tokenizer_config={"model_max_length": 64, "tokenizer_class": "GPT2Tokenizer"},
        chat_template="{{ messages }}",
    )
    before = hf_reads(tmp_path)
    for _ in range(2):
        assert convert(tmp_path, tmp_path, "--force").code == 0
        after = hf_reads(tmp_path)
        for name in ("bos_token", "eos_token", "pad_token", "model_max_length", "chat_template"):
            assert getattr(after, name) == getattr(before, name), name
        ids = before("a paradox <|start|>hi")["input_ids"]
        assert after("a paradox <|start|>hi")["input_ids"] == ids
        assert after.decode(ids, True) == before.decode(ids, True) == "a paradox hi"


def peft_adapter(base, folder):
    """An adapter that peft wrote, without a tokenizer."""
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True,
                             init_lora_weights=False, task_type="CAUSAL_LM")  # fmt: skip
    peft.get_peft_model(reference(base, torch.float32), config).save_pretrained(folder)
    return folder


def our_adapter(base, folder):
    """An adapter of a run, with a tokenizer of its own."""
    model = GPT2.from_pretrained(base)
    add_lora(model, rank=3, alpha=6, generator=torch.Generator().manual_seed(1))
    for part in adapters(model).values():
        torch.nn.init.normal_(part.lora_B, std=0.3, generator=torch.Generator().manual_seed(2))
    save_adapter(model, folder, base_model=str(base))
    Tokenizer.gpt2(300).save(folder)
    return folder


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
@pytest.mark.parametrize("make", [peft_adapter, our_adapter])
def test_an_adapter_becomes_the_model_with_it_folded_in(convert, tmp_path, capsys, make):
    base = tiny_folder(tmp_path / "base")
    adapter = make(base, tmp_path / "adapter")
    done = convert(adapter, tmp_path / "whole")
    assert done.code == 0
    assert f"{adapter} holds a LoRA adapter, folded into its base {base}" in done.err
    of_base = f"{adapter} has no tokenizer: that of its base {base} is used"
    assert (of_base in done.err) == (make is peft_adapter)
    assert Tokenizer.from_folder(tmp_path / "whole").identity == Tokenizer.gpt2(300).identity
    expected, found = GPT2.from_pretrained(adapter), GPT2.from_pretrained(tmp_path / "whole")
    assert found.config == expected.config
    for name, value in expected.named_parameters():
        assert torch.equal(found.get_parameter(name), value), name
    flags = ("--prompt", "the", "--temperature", 0, "--max-new-tokens", 9)
    texts = [run_here(capsys, "sample", "--model", folder, *flags).out
             for folder in (adapter, tmp_path / "whole")]  # fmt: skip
    assert texts[0] == texts[1] and len(texts[0]) > 9


def test_an_adapter_on_16_bits_is_rounded_once_and_only_if_not_asked_otherwise(convert, tmp_path):
    base = tiny_folder(tmp_path / "base")
    tensors = {name: value.bfloat16() for name, value in tensors_of(base).items()}
    base = copy_of(base, tmp_path / "rounded", tensors, dtype="bfloat16")
    adapter = our_adapter(base, tmp_path / "adapter")
    wide = {name: p.detach() for name, p in GPT2.from_pretrained(adapter).named_parameters()}
    for flags, dtype in ([], torch.bfloat16), (["--dtype", "float32"], torch.float32):
        dest = tmp_path / str(dtype)
        assert convert(adapter, dest, *flags).code == 0
        found = GPT2.from_pretrained(dest)
        for name, value in wide.items():
            assert torch.equal(found.get_parameter(name), value.to(dtype).float()), name


def test_a_model_is_not_written_beside_an_adapter_that_would_be_put_on_it(convert, tmp_path):
    adapter = our_adapter(tiny_folder(tmp_path / "base"), tmp_path / "adapter")
    before = names_in(adapter)
    refused(convert(adapter, adapter, "--force"), f"DEST {adapter} holds adapter_config.json")
    assert names_in(adapter) == before
