"""Adapters in files are those of peft, name and know their base, and load as a model."""

import hashlib
import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from adapted import IDX, SHAPE, assert_same, base, distance, logits, states
from hf_models import TOLERANCE, next_token_loss, reference
from minigpt2 import lora
from minigpt2.errors import InputError, NotFoundError
from minigpt2.formats.bases import MOST_ADAPTERS, base_folder
from minigpt2.formats.hugging_face import ModelFolder
from minigpt2.formats.peft import (
    TARGETS,
    LoRAConfig,
    WeightsDigest,
)
from minigpt2.formats.tensors import read_tensors, write_tensors
from minigpt2.lora import (
    adapters,
    add_lora,
    base_identity,
    has_lora,
    load_adapter,
    merge,
    save_adapter,
)
from minigpt2.model import GPT2, config_of, skeleton
from minigpt2.system.files import read_json

# peft asks transformers by a name that is to go
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def folder(hf_folder):
    """A base as transformers writes it."""
    return hf_folder(**SHAPE, n_positions=17)


@pytest.fixture
def saved(folder, tmp_path):
    """(model with trained adapters, folder they are saved in), on the base of `folder`."""
    model = GPT2.from_pretrained(folder)
    add_lora(model, rank=3, alpha=7.0)
    with torch.no_grad():
        for part in adapters(model).values():
            part.lora_B.normal_(0, 0.3)
    save_adapter(model, tmp_path / "adapter", base_model=str(folder))
    return model, tmp_path / "adapter"


def change_config(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# files, ours and peft's


def peft_model(hf_model, **values):
    """What peft makes of a transformers GPT-2; adapters random."""
    import peft

    values = {"r": 3, "lora_alpha": 7, "target_modules": [*TARGETS], **values}
    config = peft.LoraConfig(fan_in_fan_out=True, task_type="CAUSAL_LM", **values)
    model = peft.get_peft_model(hf_model, config)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name or "trainable_tokens" in name:
                parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


def test_peft_computes_with_our_adapter_what_we_compute(saved, folder):
    import peft

    model, path = saved
    theirs = peft.PeftModel.from_pretrained(reference(folder), path)
    assert distance(logits(model.double()), logits(theirs)) <= TOLERANCE
    assert distance(logits(theirs), logits(reference(folder))) > 1e-2


def test_peft_finds_and_folds_our_adapter_by_itself(saved):
    import peft

    model, path = saved
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    assert distance(logits(model.double()), logits(theirs)) <= TOLERANCE
    assert distance(logits(model), logits(theirs.merge_and_unload())) <= TOLERANCE


def test_our_files_have_the_tensors_that_peft_writes(saved, folder, tmp_path):
    _, path = saved
    theirs = peft_model(reference(folder, torch.float32))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, expected = (
        load_file(one / "adapter_model.safetensors") for one in (path, tmp_path / "theirs")
    )
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in expected.items()}
    values = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    ours = json.loads((path / "adapter_config.json").read_text())
    assert {name: values[name] for name in ours} == {**ours, "target_modules": ANY_ORDER}


class AnyOrder:
    def __eq__(self, other):
        return sorted(other) == sorted(TARGETS)


ANY_ORDER = AnyOrder()


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"use_rslora": True, "lora_dropout": 0.25},
        {"target_modules": ["c_attn"]},
        {"target_modules": ["c_proj"]},
        {"target_modules": ["transformer.h.1.mlp.c_fc", "attn.c_proj"]},
        {"target_modules": "all-linear"},
        {"init_lora_weights": "gaussian", "lora_alpha": 3.5},
        {"trainable_token_indices": {"wte": [11, 3]}},
        {"trainable_token_indices": [7]},
    ],
    ids=str,
)
def test_we_compute_with_pefts_adapter_what_peft_computes(folder, tmp_path, caplog, values):
    theirs = peft_model(reference(folder), **values)
    theirs.save_pretrained(tmp_path / "a")
    ours = GPT2.from_pretrained(folder, dtype=torch.float64)
    load_adapter(ours, tmp_path / "a")
    assert "not checked" in caplog.text
    assert distance(logits(ours), logits(theirs)) <= TOLERANCE
    trained = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    kinds = ("lora", "trainable_tokens")
    assert trained == sum(
        p.numel() for name, p in theirs.named_parameters() if any(kind in name for kind in kinds)
    )
    save_adapter(ours, tmp_path / "b", base_model=str(folder))
    again = GPT2.from_pretrained(folder, dtype=torch.float64)
    load_adapter(again, tmp_path / "b")
    assert torch.equal(logits(again), logits(ours))


def test_the_gradients_are_pefts(folder, tmp_path):
    theirs = peft_model(reference(folder))
    theirs.save_pretrained(tmp_path)
    ours = GPT2.from_pretrained(folder, dtype=torch.float64)
    load_adapter(ours, tmp_path)
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora" in name)
    next_token_loss(ours(IDX), IDX).backward()
    next_token_loss(theirs(IDX).logits, IDX).backward()
    expected = {
        name.removeprefix("base_model.model.transformer.").replace(".default.weight", ""): p.grad
        for name, p in theirs.named_parameters()
        if p.grad is not None
    }
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert max(distance(found[name], expected[name]) for name in found) <= TOLERANCE
    assert min(float(value.abs().max()) for value in found.values()) > 1e-4


def test_a_loaded_adapter_is_the_saved_one_bit_for_bit(saved, folder, caplog):
    model, path = saved
    fresh, filled = GPT2.from_pretrained(folder), GPT2.from_pretrained(folder)
    add_lora(filled, rank=3, alpha=7.0)
    for one in (fresh, filled):
        load_adapter(one, path)
        assert_same(states(one), states(model))
        assert {n for n, p in one.named_parameters() if p.requires_grad} == {
            n for n, p in model.named_parameters() if p.requires_grad
        }
    assert caplog.text == ""
    # the file says all: what is written again is the same
    save_adapter(fresh, path.parent / "again", base_model=str(folder))
    again, name = path.parent / "again", "adapter_model.safetensors"
    assert read_json(again / "adapter_config.json") == read_json(path / "adapter_config.json")
    (tensors, notes), (expected, said) = (read_tensors(f / name) for f in (again, path))
    assert_same(tensors, expected)
    assert notes == said  # not the bytes: safetensors writes the notes in any order


def test_dropout_is_kept_in_the_file(folder, tmp_path):
    model = GPT2.from_pretrained(folder)
    add_lora(model, rank=3, alpha=7.0, dropout=0.25)
    save_adapter(model, tmp_path, base_model=str(folder))
    again = GPT2.from_pretrained(folder)
    load_adapter(again, tmp_path)
    assert adapters(again)["h.0.attn.c_attn"].config == LoRAConfig(3, 7.0, 0.25)


def test_a_known_identity_is_written_without_reading_the_base(saved, monkeypatch):
    model, path = saved
    identity = base_identity(model)
    monkeypatch.setattr(lora, "base_identity", lambda model: pytest.fail("was computed"))
    save_adapter(model, path, base_model="gpt2", identity=identity)
    _, notes = read_tensors(path / "adapter_model.safetensors")
    assert notes["base_sha256"] == identity


@pytest.mark.parametrize("shape", [(5003, 17), (3, 70001), (0, 7), (7, 0), (), (40009,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_digest_of_parts_is_that_of_the_whole(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    for value in (weight, weight.T if weight.dim() == 2 else weight):
        digest = WeightsDigest()
        digest.add("x", value)
        text = f"x {tuple(value.shape)}\n".encode()
        whole = hashlib.sha256(text + value.float().contiguous().numpy().tobytes())
        assert digest.hexdigest() == whole.hexdigest()


# what is refused


def test_another_base_is_refused_by_identity_and_both_are_named(saved, folder):
    _, path = saved
    other = base(seed=3, dtype=torch.float32)
    before = states(other)
    with pytest.raises(InputError) as raised:
        load_adapter(other, path)
    message = str(raised.value)
    for part in (
        folder,
        base_identity(GPT2.from_pretrained(folder))[:16],
        base_identity(other)[:16],
    ):
        assert str(part) in message
    assert_same(states(other), before)
    assert all(p.requires_grad for p in other.parameters())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "LOHA"),
        ("task_type", "SEQ_CLS"),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("init_lora_weights", "pissa"),
        ("use_dora", True),
        ("use_qalora", True),
        ("lora_bias", True),
        ("modules_to_save", ["wte"]),
        ("rank_pattern", {"c_attn": 5}),
        ("alpha_pattern", {"c_attn": 5}),
        ("layers_to_transform", 0),
        ("layers_to_transform", [1]),
        ("exclude_modules", ["c_attn"]),
        ("layer_replication", [[0, 1]]),
        ("target_parameters", ["wte.weight"]),
        ("something_of_tomorrow", "on"),
        ("target_modules", ".*c_attn"),
        ("target_modules", ["c_attn", "lm_head"]),
        ("target_modules", ["wte"]),
        ("target_modules", [5]),
        ("target_modules", None),
        ("target_modules", []),
        ("r", 0),
        ("r", True),
        ("r", 8.0),
        ("lora_alpha", None),
        ("lora_alpha", -1),
        ("lora_dropout", 1.5),
        ("lora_dropout", "much"),
    ],
)
def test_what_cannot_be_honoured_is_refused_and_the_field_named(saved, folder, field, value):
    _, path = saved
    change_config(path, **{field: value})
    model = GPT2.from_pretrained(folder)
    names = {"r": "rank|: r", "lora_alpha": "alpha", "lora_dropout": "dropout"}
    with pytest.raises(InputError, match=names.get(field, field)) as raised:
        load_adapter(model, path)
    assert str(path / "adapter_config.json") in str(raised.value)
    assert not has_lora(model)


def test_every_field_that_peft_writes_is_read_idle_or_refused_when_set(folder, tmp_path):
    peft_model(reference(folder)).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert LoRAConfig.from_peft(values, where="x").rank == 3


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "dtype"])
def test_tensors_that_do_not_fit_are_named(saved, folder, change):
    _, path = saved
    file = path / "adapter_model.safetensors"
    tensors, notes = read_tensors(file)
    name = "base_model.model.transformer.h.1.mlp.c_fc.lora_A.weight"
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        name = "base_model.model.transformer.wte.weight"
        tensors[name] = torch.zeros(300, 14)
    elif change == "shape":
        tensors[name] = tensors[name].T.contiguous()
    else:
        tensors[name] = tensors[name].to(torch.int8)
    write_tensors(file, tensors, notes)
    with pytest.raises(InputError, match=name) as raised:
        load_adapter(GPT2.from_pretrained(folder), path)
    assert str(file) in str(raised.value)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_and_damaged_files_are_named(saved, folder, name):
    _, path = saved
    model = GPT2.from_pretrained(folder)
    (path / name).write_bytes((path / name).read_bytes()[:100])
    with pytest.raises(InputError, match=str(path / name)):
        load_adapter(model, path)
    (path / name).unlink()
    with pytest.raises(NotFoundError, match=str(path / name)):
        load_adapter(model, path)
    assert not has_lora(model)


def test_a_model_with_other_adapters_is_refused(saved, folder):
    _, path = saved
    model = GPT2.from_pretrained(folder)
    add_lora(model, rank=3, alpha=8.0)
    with pytest.raises(InputError, match=str(path)):
        load_adapter(model, path)
    model = GPT2.from_pretrained(folder)
    add_lora(model, rank=6, alpha=14.0)  # the same scale
    with pytest.raises(InputError, match=str(path)):
        load_adapter(model, path)
    model = GPT2.from_pretrained(folder)
    add_lora(model, rank=3, alpha=7.0)
    model.set_submodule("h.0.mlp.c_fc", adapters(model)["h.0.mlp.c_fc"].folded())
    with pytest.raises(InputError, match=str(path)):
        load_adapter(model, path)


# a folder with adapters as a model


@pytest.mark.parametrize(("dtype", "most"), [(None, 1e-5), (torch.float64, TOLERANCE)])
def test_a_folder_with_adapters_loads_as_a_plain_model(saved, dtype, most):
    model, path = saved
    plain = GPT2.from_pretrained(path, dtype=dtype)
    dtype = dtype or torch.float32
    assert distance(logits(plain), logits(model.to(dtype))) < most
    assert plain.wte.weight.dtype == dtype
    assert not has_lora(plain) and not plain.training
    assert all(p.requires_grad for p in plain.parameters())


def folded_by_hand(base, path, dtype):
    """The adapter loaded beside its base, and folded then: the plain way to what the files give."""
    wide = torch.promote_types(dtype, torch.float32)
    model = GPT2.from_pretrained(base, dtype=wide)
    load_adapter(model, path)
    merge(model)
    return model.to(dtype)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES, ids=str)
def stored(request, saved, tmp_path):
    """(base, adapter) with weights of some precision in both files."""
    base, adapter = tmp_path / "base", tmp_path / "stored"
    model = GPT2.from_pretrained(json.loads((saved[1] / "adapter_config.json").read_text())
                                 ["base_model_name_or_path"], dtype=request.param)  # fmt: skip
    model.save_pretrained(base)
    add_lora(model, rank=3, alpha=7.0)
    for part in adapters(model).values():
        part.lora_B.data.normal_(0, 0.3)
    save_adapter(model, adapter, base_model=str(base))
    return base, adapter


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_folded_as_it_is_read_is_bit_for_bit_what_is_folded_by_hand(stored, dtype):
    base, adapter = stored
    found, expected = GPT2.from_pretrained(adapter, dtype=dtype), folded_by_hand(*stored, dtype)
    assert_same(states(found), states(expected))
    assert not torch.equal(found.h[0].attn.c_attn.weight.double(),
                           GPT2.from_pretrained(base).h[0].attn.c_attn.weight.double())  # fmt: skip
    for ours, by_hand in zip(found.parameters(), expected.parameters()):
        assert (ours.dtype, ours.stride()) == (by_hand.dtype, by_hand.stride())


@pytest.mark.parametrize("values", [{"target_modules": ["c_attn"]}, {"use_rslora": True}], ids=str)
def test_pefts_own_is_folded_as_it_is_read_bit_for_bit_as_by_hand(folder, tmp_path, values):
    peft_model(reference(folder), **values).save_pretrained(tmp_path)
    change_config(tmp_path, base_model_name_or_path=str(folder))
    found = GPT2.from_pretrained(tmp_path)
    assert_same(states(found), states(folded_by_hand(folder, tmp_path, torch.float32)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_on_adapters_are_folded_bit_for_bit_as_by_hand(stored, tmp_path, dtype):
    _, first = stored
    model = GPT2.from_pretrained(first)
    add_lora(model, rank=2, alpha=5.0)
    for part in adapters(model).values():
        part.lora_B.data.normal_()
    save_adapter(model, tmp_path / "second", base_model=str(first))
    found = GPT2.from_pretrained(tmp_path / "second", dtype=dtype)
    assert_same(states(found), states(folded_by_hand(first, tmp_path / "second", dtype)))


def test_one_tensor_read_alone_is_that_of_the_whole_model(stored):
    base, adapter = stored
    model, files = skeleton(ModelFolder(base, (adapter,)))
    whole = dict(files.read_all({name: p.numel() for name, p in model.named_parameters()}))
    assert_same({name: tensor.read() for name, tensor in files.tensors.items()}, whole)


def test_a_base_that_was_trained_on_is_no_longer_the_adapters(stored):
    base, adapter = stored
    model = GPT2.from_pretrained(base)
    model.ln_f.bias.data[-1] += 1
    model.save_pretrained(base)
    with pytest.raises(InputError, match="was trained on") as raised:
        GPT2.from_pretrained(adapter)
    assert base_identity(model)[:16] in str(raised.value)


def test_half_precision_is_rounded_from_the_folded_weights(saved):
    _, path = saved
    expected = GPT2.from_pretrained(path).to(torch.bfloat16)
    assert_same(states(GPT2.from_pretrained(path, dtype=torch.bfloat16)), states(expected))


def test_adapters_on_adapters_load_through_both(saved, tmp_path):
    _, path = saved
    model = GPT2.from_pretrained(path)
    add_lora(model, rank=2, alpha=5.0)
    with torch.no_grad():
        adapters(model)["h.0.attn.c_attn"].lora_B.normal_()
    save_adapter(model, tmp_path / "second", base_model=str(path))
    assert distance(logits(GPT2.from_pretrained(tmp_path / "second")), logits(model)) < 1e-5


def test_a_model_beside_its_adapter_config_is_the_model(saved):
    _, path = saved
    other = base(seed=5, dtype=torch.float32)
    other.save_pretrained(path)
    assert torch.equal(logits(GPT2.from_pretrained(path)), logits(other))


@pytest.mark.parametrize("named", [None, "", 5, "../nowhere", "/no/such/folder", "no folder"])
def test_a_base_that_is_not_there_is_said_with_what_to_do(saved, named):
    _, path = saved
    change_config(path, base_model_name_or_path=named)
    with pytest.raises(InputError, match="base_model_name_or_path") as raised:
        GPT2.from_pretrained(path)
    assert str(path / "adapter_config.json") in str(raised.value)


def test_a_relative_name_that_nobody_has_is_said_with_what_to_do(saved, monkeypatch):
    _, path = saved
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    change_config(path, base_model_name_or_path="runs/base")
    with pytest.raises(InputError, match="base_model_name_or_path"):
        GPT2.from_pretrained(path)


def test_a_folder_that_names_itself_as_its_base_is_refused(saved):
    _, path = saved
    change_config(path, base_model_name_or_path=str(path))
    with pytest.raises(InputError, match="its own folder"):
        GPT2.from_pretrained(path)


def adapter_on(path, base_model):
    """A folder with adapters that name this base."""
    add_lora(model := base(dtype=torch.float32), rank=2, alpha=5.0)
    save_adapter(model, path, base_model=str(base_model))
    return path


@pytest.mark.parametrize("through", ["names", "links"])
@pytest.mark.parametrize("length", [2, 3, 5])
def test_adapters_that_lie_on_each_other_are_refused_and_two_are_named(tmp_path, length, through):
    paths = [tmp_path / f"adapter{i}" for i in range(length)]
    for path, other in zip(paths, paths[1:] + paths[:1]):
        if through == "links":
            other = other.with_name(f"link to {other.name}")
            other.symlink_to(tmp_path / other.name.removeprefix("link to "))
        adapter_on(path, other)
    for load in (GPT2.from_pretrained, config_of):
        with pytest.raises(InputError, match="never come to a model") as raised:
            load(paths[0])
        assert sum(str(path.name) in str(raised.value) for path in paths) >= 2
        assert "\n" not in str(raised.value)


def test_a_link_to_itself_is_its_own_base(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "adapter")
    path = adapter_on(tmp_path / "adapter", tmp_path / "link")
    with pytest.raises(InputError, match="its own folder"):
        GPT2.from_pretrained(path)


def test_an_adapter_on_an_adapter_without_end_is_refused(tmp_path):
    paths = [tmp_path / f"adapter{i}" for i in range(MOST_ADAPTERS + 3)]
    for path, other in pairwise(paths):
        adapter_on(path, other)
    with pytest.raises(InputError, match="never come to a model"):
        GPT2.from_pretrained(paths[0])


@pytest.mark.parametrize(
    "values",
    [
        {"r": 10**9},
        {"r": 10**9, "use_rslora": True},
        {"r": 10**400, "use_rslora": True},
        {"lora_alpha": 10**400},
        {"lora_alpha": 1e308, "use_rslora": True, "r": 10**9},
    ],
)
def test_sizes_that_are_not_the_files_are_said_before_anything_is_built(
    saved, folder, values, monkeypatch
):
    _, path = saved
    change_config(path, **values)
    monkeypatch.setattr(lora.LoRALinear, "__init__", None)
    with pytest.raises(InputError, match=str(path)):
        GPT2.from_pretrained(path)


def test_the_base_is_taken_at_the_revision_that_the_file_names(saved, monkeypatch, folder):
    _, path = saved
    asked = []

    def model_folder(source, revision, *, with_weights):
        asked.append((source, revision, with_weights))
        return folder

    monkeypatch.setattr("minigpt2.formats.bases.model_folder", model_folder)
    change_config(path, base_model_name_or_path="user/base", revision="v2")
    for with_weights in (True, False):
        assert base_folder(path, with_weights=with_weights) == folder
    assert asked == [("user/base", "v2", True), ("user/base", "v2", False)]


# Token embeddings that are trained beside adapters


def test_merging_and_unmerging_give_back_trained_rows_bit_for_bit(folder):
    model = GPT2.from_pretrained(folder)
    identity, before = base_identity(model), logits(model)
    add_lora(model, rank=2, alpha=4)
    lora.train_rows(model, [5, 9])
    plain = torch.nn.Embedding(300, 14)
    assert repr(model.wte) == repr(plain).replace("Embedding", "TrainedRows")
    assert vars(plain).keys() - {"_parameters"} <= vars(model.wte).keys()  # DDP looks at them
    assert base_identity(model) == identity and distance(logits(model), before) <= 1e-6
    with torch.no_grad():
        model.wte.rows.normal_(0, 0.3)
    beside = logits(model)
    assert distance(beside, before) > 1e-2 and base_identity(model) == identity
    with lora.merged(model):
        assert type(model.wte) is torch.nn.Embedding
        assert {name for name, _ in model.named_parameters()} == {
            name for name, _ in GPT2.from_pretrained(folder).named_parameters()
        }
        assert distance(logits(model), beside) <= 1e-6
    assert torch.equal(logits(model), beside)


def test_gradients_reach_the_trained_rows_alone_and_are_those_of_the_whole_embedding(folder):
    plain, model = (GPT2.from_pretrained(folder, dtype="float64") for _ in range(2))
    add_lora(model, rank=2, alpha=4)
    ids = [int(IDX[0, 0]), 9]
    lora.train_rows(model, ids)
    for each in (plain, model):
        each(IDX).logsumexp(-1).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "wte.rows" in trained and model.wte.frozen.grad is None
    torch.testing.assert_close(model.wte.rows.grad, plain.wte.weight.grad[ids])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"lm_head": [1]}, "trainable_token_indices is {'lm_head': .1.}, supported are token ids"),
        ({"wte": [-1]}, "supported are token ids of wte"),
        ({"wte": [True]}, "supported are token ids of wte"),
        ({"wte": [10**6]}, "trainable_token_indices has 1000000, the base has"),
        ({"wte": [1]}, "trainable_tokens_delta is missing"),
    ],
    ids=str,
)
def test_token_ids_that_do_not_fit_are_refused(saved, value, message):
    _, path = saved
    change_config(path, trainable_token_indices=value)
    with pytest.raises(InputError, match=message) as caught:
        GPT2.from_pretrained(path)
    assert "adapter_config.json" in str(caught.value) and "\n" not in str(caught.value)
