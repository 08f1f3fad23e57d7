"""Weights are read strictly, under all the names and from all the files they come in, and written
so that transformers reads them.
"""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from dataclasses import dataclass

import pytest
import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import save_file

from hf_models import (
    GPT2_124M,
    TOLERANCE,
    copy_of,
    logit_difference,
    randomised,
    reference,
    tensors_of,
    token_ids,
)
from minigpt2 import model as model_module
from minigpt2.errors import InputError, NotFoundError
from minigpt2.formats import hugging_face
from minigpt2.formats import tensors as tensor_files
from minigpt2.formats.hugging_face import TensorFiles
from minigpt2.lora import add_lora, save_adapter
from minigpt2.model import GPT2, skeleton

SMALL = {"n_layer": 2, "n_positions": 16}


@pytest.fixture
def folder(hf_folder, tmp_path):
    """A function that copies a small model's folder with other tensors and config values."""

    def make(tensors=None, **values):
        return copy_of(hf_folder(**SMALL), tmp_path / "model", tensors, **values)

    return make


@pytest.fixture
def tensors(hf_folder):
    """The small model's tensors under the names of the published files."""
    return tensors_of(hf_folder(**SMALL))


def refusal(folder, error=InputError):
    """The one line that says why a folder is not loaded."""
    with pytest.raises(error) as caught:
        GPT2.from_pretrained(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


def assert_same_weights(folder, expected):
    """Every parameter of the model loaded from a folder has the value of the tensor of its name."""
    model = GPT2.from_pretrained(folder)
    loaded = dict(model.named_parameters())
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        transposed = re.search(r"(attn\.c_attn|c_proj|c_fc)\.weight", name)
        assert torch.equal(loaded[name], (value.T if transposed else value).float()), name


PREFIXES = ["", "transformer.", "_orig_mod.", "module.", "module._orig_mod.transformer."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_are_taken_off(folder, tensors, prefix):
    path = folder({prefix + name: value for name, value in tensors.items()})
    assert_same_weights(path, tensors)


def test_the_files_of_the_hub_and_of_transformers_are_the_same_model(hf_folder, tmp_path):
    stored = tensors_of(hf_folder())
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(12)}
    hub_shaped = copy_of(hf_folder(), tmp_path / "hub", {**stored, **masks})
    assert_same_weights(hub_shaped, stored)
    assert_same_weights(hf_folder(), stored)
    assert logit_difference(hub_shaped) <= TOLERANCE


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_stored_masks_are_left_out_and_biases_kept(folder, tensors, prefix):
    mask = torch.ones(1, 1, 16, 16).tril()
    masks = {
        "h.0.attn.bias": mask,
        "h.1.attn.bias": mask.to(torch.uint8),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
        "h.1.attn.masked_bias": torch.tensor(-1e4),
    }
    stored = {prefix + name: value for name, value in {**tensors, **masks}.items()}
    assert_same_weights(folder(stored), tensors)
    assert tensors["h.0.attn.c_attn.bias"].any()


def test_a_name_that_only_resembles_a_mask_is_not_left_out(folder, tensors):
    problem = refusal(folder({**tensors, "h.0.mlp.attn.bias": torch.ones(1)}))
    assert "h.0.mlp.attn.bias is not part of this model" in problem


def test_one_tensor_under_two_names_is_refused(folder, tensors):
    twice = {**tensors, "transformer.wpe.weight": tensors["wpe.weight"].clone()}
    assert "model.safetensors holds wpe.weight twice, once as " in refusal(folder(twice))


def test_each_missing_tensor_is_named(hf_folder):
    model, files = skeleton(hf_folder())
    assert len(files.tensors) == 148
    for name in files.tensors:
        rest = {other: files.tensors[other] for other in files.tensors if other != name}
        with pytest.raises(InputError, match=rf"config\.json: {re.escape(name)} is missing$"):
            hugging_face.check(model, TensorFiles(files.folder, rest))


@pytest.mark.parametrize("name", ["wte.weight", "wpe.weight", "h.1.ln_1.bias", "ln_f.weight"])
def test_a_file_without_a_tensor_is_refused(folder, tensors, name):
    del tensors[name]
    assert refusal(folder(tensors)).endswith(f": {name} is missing")


@pytest.fixture
def nothing_is_built(monkeypatch):
    """No block of a model can be made."""

    def built(*_):
        raise AssertionError("a block was built")

    monkeypatch.setattr(model_module.Block, "__init__", built)


LAYOUTS = ["model.safetensors", "shards", "pytorch_model.bin", "pickled shards"]


def laid_out(path, layout):
    """The folder with its weights in another kind of file."""
    tensors = tensors_of(path)
    if layout == "model.safetensors":
        return path
    (path / "model.safetensors").unlink()
    if layout == "pytorch_model.bin":
        torch.save(tensors, path / layout)
        return path
    name, write = {"shards": ("model.safetensors", save_file),
                   "pickled shards": ("pytorch_model.bin", torch.save)}[layout]  # fmt: skip
    stem, suffix = name.split(".")
    halves = [dict(list(tensors.items())[half::2]) for half in (0, 1)]
    places = {}
    for number, half in enumerate(halves, start=1):
        shard = f"{stem}-0000{number}-of-00002.{suffix}"
        write(half, path / shard)
        places |= dict.fromkeys(half, shard)
    (path / f"{name}.index.json").write_text(json.dumps({"weight_map": places}))
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"n_layer": 10**6}, "n_layer is 1,000,000, there are layers 0 to 1"),
        ({"n_layer": 3}, "n_layer is 3, there are layers 0 to 1"),
        ({"n_layer": 1}, "n_layer is 1, there are layers 0 to 1"),
        ({"n_positions": 2**31 - 1}, "n_positions is 2,147,483,647, wpe.weight is (16, 64)"),
        ({"n_positions": 15}, "n_positions is 15, wpe.weight is (16, 64)"),
        ({"vocab_size": 2**31}, "vocab_size is 2,147,483,648, wte.weight is (257, 64)"),
        ({"n_inner": 2**31}, "n_inner is 2,147,483,648, h.0.mlp.c_fc.bias is (256,)"),
        ({"n_embd": 2**31, "n_head": 2**31}, "n_embd is 2,147,483,648, wte.weight is (257, 64)"),
        ({"n_embd": 10**300, "n_head": 1}, "wte.weight is (257, 64)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.usefixtures("nothing_is_built")
def test_sizes_that_are_not_the_files_are_said_before_anything_is_built(
    folder, tensors, layout, values, problem
):
    path = laid_out(folder(tensors, **values), layout)
    told = refusal(path)
    assert problem in told and str(path / "config.json") in told
    assert any(f"{path / name}: " in told for name in
               ("model.safetensors", "model.safetensors.index.json",
                "pytorch_model.bin", "pytorch_model.bin.index.json"))  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_tensors_in_any_file_are_the_model(folder, tensors, layout):
    assert_same_weights(laid_out(folder(tensors), layout), tensors)


@pytest.mark.usefixtures("nothing_is_built")
def test_all_sizes_that_differ_are_listed(folder, tensors):
    told = refusal(folder(tensors, n_layer=5, vocab_size=7, n_embd=8, n_positions=9, n_inner=10))
    assert re.findall(r"(\w+) is (\d+), ", told) == [
        ("n_layer", "5"), ("vocab_size", "7"), ("n_embd", "8"), ("n_positions", "9"),
        ("n_inner", "10")]  # fmt: skip


ALIASES = {"n_positions": "max_position_embeddings", "n_embd": "hidden_size"}
ALIASES |= {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}


def test_sizes_may_have_the_names_that_transformers_has_for_them_too(folder, tensors):
    path = folder(tensors)
    values = json.loads((path / "config.json").read_text())
    renamed = {ALIASES.get(name, name): value for name, value in values.items()}
    (path / "config.json").write_text(json.dumps(renamed))
    assert logit_difference(path, length=16) <= TOLERANCE
    for name in ALIASES.values():
        for value in (0, 7):
            (path / "config.json").write_text(json.dumps({**renamed, name: value}))
            assert f"{name} is {value}, " in refusal(path)
    (path / "config.json").write_text(json.dumps({**values, "hidden_size": 32}))
    assert "n_embd is 64 and hidden_size, which is the same, is 32" in refusal(path)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("float16", 65520.0), ("float16", -1e5), ("bfloat16", 3.4e38)],
)
def test_a_number_that_a_dtype_cannot_hold_is_refused_when_it_is_loaded(
    folder, tensors, dtype, value
):
    name = "h.1.mlp.c_fc.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][3, 5] = value
    path = folder(tensors)
    with pytest.raises(InputError) as caught:
        GPT2.from_pretrained(path, dtype=dtype)
    assert f"{path / 'model.safetensors'}: {name} holds {value:.6g}, which {dtype} cannot" in str(
        caught.value
    )
    tensors[name][3, 5] = 65519.0 if dtype == "float16" else 3e38  # rounds to what there is
    tensors[name][3, 6] = torch.inf
    save_file(tensors, path / "model.safetensors")
    GPT2.from_pretrained(path, dtype=dtype)


def test_many_tensors_of_a_kind_become_a_count_with_examples(folder, tensors):
    kept = {name: value for name, value in tensors.items() if name.startswith("w")}
    kept["h.1.ln_1.bias"] = tensors["h.1.ln_1.bias"]
    kept |= {f"extra.{i}": torch.ones(1) for i in range(1000)}
    problem = refusal(folder(kept))
    assert problem.partition("config.json: ")[2] == (
        "25 tensors are missing, such as h.0.attn.c_attn.bias, h.0.attn.c_attn.weight, "
        "h.0.attn.c_proj.bias; 1000 tensors are not part of this model, such as extra.0, extra.1, "
        "extra.10"
    )


def test_many_shapes_and_dtypes_become_a_count_with_examples(folder, tensors):
    tables = ("wte.weight", "wpe.weight", "h.0.mlp.c_fc.bias")
    tensors = {n: value if n in tables else value[None].int() for n, value in tensors.items()}
    problem = refusal(folder(tensors))
    assert "25 tensors have another shape, such as: h.0.attn.c_attn.bias is (1, 192), ex" in problem
    assert "25 tensors have another dtype, such as: h.0.attn.c_attn.bias is I32, expe" in problem
    assert problem.count("expected") == 6


def test_weights_stored_the_torch_way_round_are_refused(folder, tensors):
    for name, value in tensors.items():
        if name.endswith(("c_attn.weight", "c_fc.weight")):
            tensors[name] = value.T.contiguous()
    problem = refusal(folder(tensors))
    assert "h.0.attn.c_attn.weight is (192, 64), expected (64, 192)" in problem


def test_everything_wrong_is_listed_at_once(folder, tensors):
    del tensors["h.0.ln_1.bias"], tensors["h.1.attn.c_proj.weight"]
    tensors["adapter.weight"] = torch.ones(1)
    tensors["wpe.weight"] = torch.ones(16, 3)
    tensors["ln_f.bias"] = torch.ones(64, dtype=torch.int32)
    tensors["ln_f.weight"] = torch.ones(2, dtype=torch.bool)
    problem = refusal(folder(tensors))
    listed = problem.partition("config.json: ")[2].split("; ")
    assert [item.split(" is ")[0] for item in listed] == [
        "h.0.ln_1.bias",  # missing
        "h.1.attn.c_proj.weight",
        "adapter.weight",  # not part of the model
        "ln_f.weight",  # of another shape
        "wpe.weight",
        "ln_f.bias",  # of another dtype
        "ln_f.weight",
    ]
    assert problem.count("expected F32, F16, BF16, F64") == 2


def test_without_a_stored_head_the_embedding_is_the_head(folder, tensors):
    model = GPT2.from_pretrained(folder(tensors))
    assert model.config.tie_word_embeddings and not hasattr(model, "lm_head")


def test_a_stored_head_equal_to_the_embedding_stays_tied(folder, tensors):
    path = folder({**tensors, "lm_head.weight": tensors["wte.weight"].clone()})
    model = GPT2.from_pretrained(path)
    assert model.config.tie_word_embeddings and not hasattr(model, "lm_head")
    assert logit_difference(path, length=16) <= TOLERANCE


@pytest.mark.parametrize("tied", [True, False])
def test_a_stored_head_that_differs_is_used_whatever_the_config_says(folder, tensors, tied):
    head = tensors["wte.weight"].flip(0).contiguous()
    path = folder({**tensors, "lm_head.weight": head}, tie_word_embeddings=tied)
    model = GPT2.from_pretrained(path)
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, head)
    assert torch.equal(model.wte.weight, tensors["wte.weight"])
    assert logit_difference(path, length=16) <= TOLERANCE


def test_an_untied_config_without_a_stored_head_is_refused(folder, tensors):
    path = folder(tensors, tie_word_embeddings=False)
    for deferred in (False, True):  # the second way would make a head of the embedding
        with pytest.raises(InputError, match=r"embeddings is false.* no lm_head\.weight"):
            GPT2.from_pretrained(path, deferred=deferred)


def test_an_untied_config_with_equal_matrices_keeps_two_of_them(folder, tensors):
    head = tensors["wte.weight"].clone()
    model = GPT2.from_pretrained(folder({**tensors, "lm_head.weight": head},
                                        tie_word_embeddings=False))  # fmt: skip
    assert torch.equal(model.lm_head.weight, model.wte.weight)
    assert model.lm_head.weight.data_ptr() != model.wte.weight.data_ptr()


def test_sharded_safetensors_are_the_model(hf_folder, tmp_path):
    randomised().save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert_same_weights(tmp_path, tensors_of(hf_folder()))


@pytest.mark.parametrize("index", ["model.safetensors", "pytorch_model.bin"])
def test_a_missing_shard_is_refused_by_name(folder, index):
    path = folder()
    name = index.replace(".", "-00001-of-00002.")
    (path / f"{index}.index.json").write_text(json.dumps({"weight_map": {"wte.weight": name}}))
    problem = refusal(path, NotFoundError)
    assert f"{path / name} is missing, which {index}.index.json names" in problem


HOSTILE = ["../model.safetensors", "/etc/passwd", "C:\\model.safetensors", "a/b", "..", "", 3, None]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_shard_outside_the_folder_is_refused(folder, tensors, name):
    path = folder()
    save_file(tensors, path.parent / "model.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert f"names the weight file {name!r}, expected a plain file name" in refusal(path)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', "[]"])
def test_an_index_that_names_no_files_is_refused(folder, content):
    path = folder()
    (path / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refusal(path)


def test_a_tensor_in_two_shards_is_refused(folder, tensors):
    path, shards = folder(), ["a.safetensors", "b.safetensors"]
    save_file(tensors, path / "a.safetensors")
    save_file({"wte.weight": tensors["wte.weight"]}, path / "b.safetensors")
    index = {"weight_map": {"wpe.weight": shards[0], "wte.weight": shards[1]}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "b.safetensors holds wte.weight twice" in refusal(path)


def test_a_shard_that_lacks_what_its_index_promises_is_refused(folder, tensors):
    path = folder()
    index = {"weight_map": dict.fromkeys(tensors, "a.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    del tensors["wte.weight"]
    save_file(tensors, path / "a.safetensors")
    assert refusal(path).endswith(": wte.weight is missing")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-torch-1.6"])
def test_a_pickle_of_tensors_is_the_model(folder, tensors, zipped):
    path = folder()
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    tensors["lm_head.weight"] = tensors["wte.weight"]  # one storage, as transformers wrote it
    torch.save(
        {f"transformer.{name}" if name != "lm_head.weight" else name: value
         for name, value in tensors.items()},
        path / "pytorch_model.bin",
        _use_new_zipfile_serialization=zipped,
    )  # fmt: skip
    del tensors["h.0.attn.bias"], tensors["lm_head.weight"]
    assert_same_weights(path, tensors)


def test_pickled_parameters_and_views_are_the_model(folder, tensors):
    path = folder()
    views = {name: value.T.contiguous().T for name, value in tensors.items() if value.dim() == 2}
    stored = {name: nn.Parameter(views.get(name, value)) for name, value in tensors.items()}
    torch.save(stored, path / "pytorch_model.bin")
    assert_same_weights(path, tensors)


def test_sharded_pickles_are_the_model(folder, tensors):
    path, names = folder(), sorted(tensors)
    shards = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for shard, part in shards.items():
        torch.save({name: tensors[name] for name in part}, path / shard)
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_same_weights(path, tensors)


def test_safetensors_are_read_where_there_is_a_pickle_too(folder, tensors):
    path = folder(tensors)
    (path / "pytorch_model.bin").write_bytes(b"never opened")
    assert_same_weights(path, tensors)


class Evil:
    """Unpickled carelessly, it makes a folder."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-torch-1.6"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_no_code_in_a_pickle_is_run(folder, tensors, tmp_path, name, zipped):
    path, marker = folder(), tmp_path / "evil"
    values = {**tensors, "evil": Evil(marker)}
    torch.save(values, path / name, _use_new_zipfile_serialization=zipped)
    assert f"{path / name} cannot be read as weights" in refusal(path)
    assert not marker.exists()
    with (path / name).open("rb") as file:
        torch.load(file, weights_only=False)
    assert marker.exists()  # read carelessly, it does harm


@pytest.mark.parametrize(
    "values", [[torch.ones(1)], {"model": {}}, {3: torch.ones(1)}, {}], ids=str
)
def test_a_pickle_of_something_else_is_refused(folder, values):
    path = folder()
    torch.save(values, path / "pytorch_model.bin")
    refusal(path)


def damaged(tensors, path):
    """Ways for a file of weights to be none: (content, what the message calls it)."""
    writer = save_file if path.suffix == ".safetensors" else torch.save
    writer(tensors, path)
    whole = path.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.txt", "not weights")
    sizes = "zip archive" if path.suffix == ".bin" else " bytes"
    return {
        "empty": (b"", "an empty file"),
        "pointer": (pointer, "a Git LFS pointer, not the file itself: run `git lfs pull`"),
        "page": (b"<!DOCTYPE html><html>Sign in</html>", "an HTML or XML page"),
        "zip": (path.read_bytes(), "a zip archive"),
        "gguf": (b"GGUF\x03\0\0\0\0\0\0\0", "a GGUF file"),
        "noise": (bytes(range(256)) * 4, "1,024 bytes"),
        "short": (whole[:7], sizes if path.suffix == ".bin" else "7 bytes"),
        "half": (whole[: len(whole) // 2], sizes),
        "one byte short": (whole[:-1], sizes),
    }


KINDS = ["empty", "pointer", "page", "zip", "gguf", "noise", "short", "half", "one byte short"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_damaged_file_is_named_for_what_it_is(folder, tensors, name, kind):
    path = folder() / name
    content, description = damaged(tensors, path)[kind]
    path.write_bytes(content)
    problem = refusal(path.parent)
    assert f"{path} cannot be read as weights: " in problem and description in problem


def test_a_byte_too_many_is_refused(folder, tensors):
    path = folder(tensors) / "model.safetensors"
    with path.open("ab") as file:
        file.write(b"\0")
    assert f"{path} cannot be read as weights" in refusal(path.parent)


def test_a_folder_in_place_of_the_file_is_refused(folder):
    path = folder() / "model.safetensors"
    path.mkdir()
    assert f"{path} cannot be read as weights: a folder" in refusal(path.parent)


def test_a_folder_without_weights_says_what_it_holds(folder):
    problem = refusal(folder(), NotFoundError)
    assert "holds no model.safetensors and no pytorch_model.bin" in problem
    assert problem.endswith("it holds config.json, generation_config.json")


def test_a_folder_without_a_config_is_refused(folder, tensors):
    path = folder(tensors)
    (path / "config.json").unlink()
    assert f"{path / 'config.json'} does not exist" in refusal(path, NotFoundError)


def test_a_saved_file_holds_the_published_names_and_its_format(hf_folder, tmp_path):
    GPT2.from_pretrained(hf_folder()).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
    assert names == set(tensors_of(hf_folder())) and "lm_head.weight" not in names
    stored = tensors_of(hf_folder())
    saved = tensors_of(tmp_path)
    assert all(torch.equal(saved[name], stored[name]) for name in stored)


def test_an_untied_head_is_saved_beside_the_embedding(hf_folder, tmp_path):
    GPT2.from_pretrained(hf_folder(tie_word_embeddings=False)).save_pretrained(tmp_path)
    saved = tensors_of(tmp_path)
    assert not torch.equal(saved["lm_head.weight"], saved["wte.weight"])
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    reference(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
def test_saved_files_have_the_mode_that_the_umask_gives(hf_folder, tmp_path):
    before = os.umask(0o027)
    try:
        GPT2.from_pretrained(hf_folder(**SMALL)).save_pretrained(tmp_path / "run")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").iterdir()}
    names = ("config.json", "generation_config.json", "model.safetensors")
    assert modes == dict.fromkeys(names, 0o640)


def test_saving_over_the_folder_a_model_came_from_changes_nothing(hf_folder, tmp_path):
    shutil.copytree(hf_folder(**SMALL), tmp_path / "run")
    expected = tensors_of(tmp_path / "run")
    for _ in range(2):
        GPT2.from_pretrained(tmp_path / "run").save_pretrained(tmp_path / "run")
        assert_same_weights(tmp_path / "run", expected)


def test_a_save_that_fails_leaves_the_old_weights(hf_folder, tmp_path, monkeypatch):
    model = GPT2.from_pretrained(hf_folder(**SMALL))
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise tensor_files.SafetensorError("No space left on device")

    monkeypatch.setattr(tensor_files, "save_file", fail)
    with torch.no_grad():
        model.wte.weight.zero_()
    with pytest.raises(OSError, match="could not take the weights: No space left on device"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


def test_each_tensor_is_read_once_and_the_largest_first(hf_folder):
    model, files = skeleton(hf_folder(**SMALL))
    read = []

    def noted(name, stored):
        return stored._replace(read=lambda: read.append(name) or stored.read())

    noting = {name: noted(name, stored) for name, stored in files.tensors.items()}
    hugging_face.fill(model, TensorFiles(files.folder, noting), device="cpu", dtype=torch.float32)
    assert sorted(read) == sorted(files.tensors)
    sizes = [files.tensors[name].read().numel() for name in read]
    assert sizes == sorted(sizes, reverse=True)


def test_a_file_that_is_cut_short_while_it_is_read_is_an_error(folder, tensors):
    path = folder(tensors)
    stored = TensorFiles.open(path).tensors
    os.truncate(path / "model.safetensors", 3000)
    with pytest.raises(InputError, match=r"ends within wte.weight \(3,000 bytes\)"):
        stored["wte.weight"].read()


def test_a_model_can_be_loaded_onto_another_device(hf_folder):
    model = GPT2.from_pretrained(hf_folder(**SMALL), device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float16)}


MEASURE = r"""
import re, sys
from pathlib import Path
from minigpt2.model import GPT2

def status(name):
    text = Path("/proc/self/status").read_text()
    return int(re.search(name + r":\s+(\d+) kB", text)[1]) * 1024

before = status("VmRSS")
model = GPT2.from_pretrained(sys.argv[1])
print((status("VmHWM") - before) / sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
@pytest.mark.parametrize("kind", ["whole", "sharded", "with its head", "with an adapter"])
def test_loading_takes_little_more_memory_than_the_model(hf_folder, tmp_path, kind):
    stored = tensors_of(hf_folder(**GPT2_124M))
    if kind == "sharded":
        path = copy_of(hf_folder(**GPT2_124M), tmp_path / "m")
        index = {}
        for number, part in enumerate([sorted(stored)[::2], sorted(stored)[1::2]]):
            save_file({name: stored[name] for name in part}, path / f"{number}.safetensors")
            index.update(dict.fromkeys(part, f"{number}.safetensors"))
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    elif kind == "with an adapter":
        path, model = tmp_path / "adapter", GPT2.from_pretrained(hf_folder(**GPT2_124M))
        add_lora(model, rank=8, alpha=16)
        save_adapter(model, path, base_model=str(hf_folder(**GPT2_124M)))
        del model
    else:
        head = {"lm_head.weight": stored["wte.weight"].clone()} if kind == "with its head" else {}
        path = copy_of(hf_folder(**GPT2_124M), tmp_path / "m", {**stored, **head})
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True
    )
    assert 0.95 < float(done.stdout) < 1.3


def test_a_loaded_model_does_not_depend_on_its_files(folder, tensors):
    path = folder(tensors)
    model, idx = GPT2.from_pretrained(path), token_ids(257, 2, 16)
    with torch.no_grad():
        before = model(idx)
        (path / "model.safetensors").write_bytes(b"")
        assert torch.equal(model(idx), before)


@dataclass
class PlainConfig:
    """A config of a module without `from __future__ import annotations`: its types are no text."""

    n_layer: int
    n_inner: int | None = None
    scale: float = 1.0
    tied: bool = True
    act: str = "gelu"


def test_the_types_of_a_config_are_known_however_its_module_writes_them():
    values = {"vocab_size": 7, "n_positions": 5, "n_embd": 3, "n_layer": 2, "n_head": 1}
    values |= {"n_inner": None, "scale": 3, "tied": False, "act": "relu"}
    found = hugging_face.read_config_fields(values, PlainConfig, "config.json")
    assert found == {name: values[name] for name in ("n_layer", "n_inner", "scale", "tied", "act")}
    with pytest.raises(InputError, match=r"n_inner is True, expected int \| null"):
        hugging_face.read_config_fields(values | {"n_inner": True}, PlainConfig, "config.json")


def with_header(path, change):
    """Change what a safetensors file says of its tensors; its values stay."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


WRONG_HEADERS = {
    "a gap": lambda part: part.update(data_offsets=[part["data_offsets"][0] + 4] * 2),
    "another shape": lambda part: part.update(shape=[3, *part["shape"]]),
    "another format": lambda part: part.update(dtype="F64"),
    "an unknown format": lambda part: part.update(dtype="F5"),
    "no offsets": lambda part: part.pop("data_offsets"),
    "no object": lambda part: part.clear(),
}


@pytest.mark.parametrize("name", WRONG_HEADERS)
def test_a_header_that_does_not_describe_its_file_is_refused(hf_folder, tmp_path, name):
    folder = copy_of(hf_folder(), tmp_path / "m", tensors_of(hf_folder()))
    path = folder / "model.safetensors"
    with_header(path, lambda header: None)
    assert torch.equal(
        GPT2.from_pretrained(folder).wpe.weight, GPT2.from_pretrained(hf_folder()).wpe.weight
    )
    with_header(path, lambda header: WRONG_HEADERS[name](header["wpe.weight"]))
    with pytest.raises(InputError, match="its header is not that of this file"):
        GPT2.from_pretrained(folder)


def test_weights_are_read_and_never_mapped(hf_folder, monkeypatch):
    monkeypatch.setattr(tensor_files, "safe_open", lambda *_, **__: pytest.fail("mapped"))
    GPT2.from_pretrained(hf_folder())
