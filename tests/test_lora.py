"""Adapters start as nothing, train alone, fold in and out, and are those of peft."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from hf_models import TOLERANCE, next_token_loss, randomise, reference, token_ids
from minigpt2 import lora, weights
from minigpt2.errors import InputError, NotFoundError
from minigpt2.lora import (
    TARGETS,
    LoRAConfig,
    adapters,
    add_lora,
    base_folder,
    base_identity,
    has_lora,
    load_adapter,
    merge,
    merged,
    save_adapter,
    unmerge,
)
from minigpt2.model import GPT2, GPT2Config

# peft asks transformers by a name that is to go
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

SHAPE = {"vocab_size": 300, "n_embd": 14, "n_layer": 2, "n_head": 2, "n_inner": 23}
CONFIG = GPT2Config(**SHAPE, block_size=17)
IDX = token_ids(300, 3, 11)


def base(seed=0, dtype=torch.float64):
    """A tiny GPT-2 with random values everywhere, in evaluation mode."""
    model = GPT2(CONFIG).eval()
    randomise(model, seed=seed)
    return model.to(dtype)


def adapted(seed=0, dtype=torch.float64, rank=3, alpha=7.0, dropout=0.0):
    """The same with adapters, B random too: its zeros would hide every mistake in A and scale."""
    model = base(seed, dtype)
    add_lora(model, rank=rank, alpha=alpha, dropout=dropout)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for part in adapters(model).values():
            part.lora_A.normal_(0, 0.3, generator=generator)
            part.lora_B.normal_(0, 0.3, generator=generator)
    return model


def states(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@torch.no_grad()
def logits(model):
    output = model(IDX)
    return output if isinstance(output, torch.Tensor) else output.logits


def distance(left, right):
    return float((left - right).detach().abs().max())


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


# what an adapter is


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_fresh_adapter_changes_no_bit_of_the_logits(dtype):
    model = base(dtype=dtype)
    before = logits(model)
    add_lora(model, rank=3, alpha=7.0, dropout=0.3)
    model.train()  # the base's own dropout is 0.1: off, so that only the adapter's is on
    model.set_dropout(0.0)
    assert torch.equal(logits(model), before)


def test_an_adapter_adds_its_scaled_product_to_what_the_linear_computes():
    part = adapters(adapted())["h.1.mlp.c_proj"]
    x = torch.randn(2, 5, 23, dtype=torch.float64)
    expected = x @ (part.weight + 7 / 3 * part.lora_B @ part.lora_A).T + part.bias
    assert distance(part(x), expected) < 1e-12


def test_the_base_keeps_its_parameters_their_names_and_their_memory():
    model = base()
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    add_lora(model, rank=3, alpha=7.0)
    after = {name: p.data_ptr() for name, p in model.named_parameters() if "lora" not in name}
    assert after == before
    assert has_lora(model) and not has_lora(base())


def test_every_linear_of_every_block_has_an_adapter_and_nothing_else_trains():
    model = adapted()
    assert [*adapters(model)] == [f"h.{i}.{target}" for i in range(2) for target in TARGETS]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{matrix}" for name in adapters(model) for matrix in "AB"}


def test_the_124m_model_trains_one_percent_of_its_weights_at_rank_8():
    with torch.device("meta"):
        model = GPT2(GPT2Config())
    add_lora(model, rank=8, alpha=16)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 12 * 8 * (768 * 4 + 768 * 2 + 768 * 5 + 768 * 5) == 1_179_648
    assert trained * 4 < 10e6  # bytes of the file


def test_a_step_of_the_optimizer_changes_the_adapters_alone():
    model = adapted(dropout=0.2).train()
    before = states(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    next_token_loss(model(IDX), IDX).backward()
    optimizer.step()
    changed = {
        name for name, value in states(model).items() if not torch.equal(value, before[name])
    }
    assert changed == {name for name in before if "lora" in name}


def test_a_is_drawn_from_the_generator_and_from_nothing_else():
    state = torch.get_rng_state()
    models = [base(), base()]
    for model in models:
        add_lora(model, rank=3, alpha=7.0, generator=torch.Generator().manual_seed(5))
    assert_same(states(models[0]), states(models[1]))
    torch.set_rng_state(state)
    model = GPT2(CONFIG)
    state = torch.get_rng_state()
    add_lora(model, rank=3, alpha=7.0, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), state)
    assert 0.9 < adapters(model)["h.0.mlp.c_proj"].lora_A.abs().max() * 23**0.5 <= 1


def test_dropout_acts_on_what_goes_into_a_while_training_and_is_not_the_models():
    model = adapted(dropout=0.4).train()
    part = adapters(model)["h.0.attn.c_attn"]
    x = torch.randn(3, 14, dtype=torch.float64)
    torch.manual_seed(3)
    y = part(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.4)
    expected = x @ part.weight.T + part.bias + 7 / 3 * dropped @ part.lora_A.T @ part.lora_B.T
    assert distance(y, expected) < 1e-12
    model.set_dropout(0.0)
    assert not torch.equal(part(x), part(x))
    model.eval()
    assert torch.equal(part(x), part(x))


@pytest.mark.parametrize("size", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_sizes_that_make_no_adapter_are_refused(size):
    model = base()
    with pytest.raises(InputError, match=next(iter(size))):
        add_lora(model, **{"rank": 3, "alpha": 7.0, **size})
    assert not has_lora(model)
    assert all(p.requires_grad for p in model.parameters())


def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_parameters():
    model = adapted(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(IDX)
    assert output.dtype == torch.bfloat16
    assert distance(output.float(), logits(model)) < 0.1 * float(logits(model).abs().max())
    output.float().square().mean().backward()
    assert all(part.lora_A.grad.dtype == torch.float32 for part in adapters(model).values())


def test_recomputing_the_activations_gives_the_same_gradients_with_dropout_on():
    gradients = []
    for recompute in (False, True):
        model = adapted(dropout=0.4).train()
        model.set_dropout(0.0)
        x = model.wte(IDX)
        torch.manual_seed(3)
        for block in model.h:
            run = (lambda f, *a: checkpoint(f, *a, use_reentrant=False)) if recompute else None
            x = run(block, x, None, None) if run else block(x, None, None)
        x.square().mean().backward()
        gradients.append([part.lora_A.grad for part in adapters(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


# in and out of the weights


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_folded_adapters_compute_what_they_computed_beside(dtype, most):
    model = adapted(dtype=dtype)
    apart = logits(model)
    merge(model)
    assert 0 < distance(logits(model), apart) < most
    assert distance(logits(base(dtype=dtype)), apart) > 1e-2
    assert not has_lora(model) and not any(p.requires_grad for p in model.parameters())
    assert {type(model.get_submodule(f"h.1.{target}")) for target in TARGETS} == {torch.nn.Linear}


def test_bfloat16_weights_are_rounded_once_after_the_sum():
    model = adapted(dtype=torch.bfloat16)
    part = adapters(model)["h.0.attn.c_attn"]
    change = 7 / 3 * (part.lora_B.float() @ part.lora_A.float())
    assert torch.equal(part.folded().weight, (part.weight.float() + change).bfloat16())


def test_unmerging_restores_every_bit_the_modules_and_the_mode():
    model = adapted(dtype=torch.float32).train()
    before, ids = states(model), [id(p) for p in model.parameters()]
    taken = merge(model)
    assert states(model).keys() == states(base()).keys()
    model.eval()
    unmerge(model, taken)
    assert_same(states(model), before)
    assert [id(p) for p in model.parameters()] == ids
    assert not any(part.training for part in model.modules())


def test_a_running_training_can_write_the_merged_model_and_goes_on_unchanged(tmp_path):
    ends = []
    for write in (False, True):
        model = adapted(dtype=torch.float32, dropout=0.2).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        torch.manual_seed(3)
        for step in range(3):
            next_token_loss(model(IDX), IDX).backward()
            optimizer.step()
            optimizer.zero_grad()
            if write and step == 1:
                with merged(model) as plain:
                    plain.save_pretrained(tmp_path / "merged")
                    expected = logits(plain.eval())
                model.train()
        ends.append(states(model))
    assert_same(*ends)
    assert distance(logits(reference(tmp_path / "merged", torch.float32)), expected) < 1e-4
    assert torch.equal(logits(GPT2.from_pretrained(tmp_path / "merged")), expected)


def test_the_tied_embedding_stays_tied_and_untouched(tmp_path):
    model = adapted()
    untouched = base().wte.weight
    with merged(model) as plain:
        plain.save_pretrained(tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["wte.weight"], untouched)
    assert torch.equal(model.wte.weight, untouched)
    assert not any("lm_head" in name for name, _ in model.named_parameters())


# the identity of the base


def test_the_identity_is_the_bases_with_and_without_adapters():
    identity = base_identity(base(dtype=torch.float32))
    assert len(identity) == 64
    assert base_identity(adapted(dtype=torch.float32)) == identity
    assert base_identity(adapted(dtype=torch.float32, rank=5)) == identity
    assert base_identity(base(dtype=torch.float64)) == identity
    assert base_identity(base(seed=1)) != identity


@pytest.mark.parametrize("name", ["wte.weight", "ln_f.bias", "h.1.mlp.c_fc.bias"])
def test_the_identity_changes_with_one_bit_of_any_weight(name):
    model = adapted(dtype=torch.float32)
    identity = base_identity(model)
    with torch.no_grad():
        value = model.get_parameter(name).view(-1)[-1]
        value.copy_(torch.nextafter(value, torch.tensor(9.0)))
    assert base_identity(model) != identity


def test_the_identity_tells_equal_bytes_of_other_shapes_and_names_apart():
    def identity(**parameters):
        module = torch.nn.Module()
        for name, value in parameters.items():
            module.register_parameter(name, torch.nn.Parameter(value))
        return base_identity(module)

    zeros = torch.zeros(2, 3)
    found = [identity(a=zeros), identity(a=zeros.T.contiguous()), identity(b=zeros)]
    assert len({*found}) == 3


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
            if "lora" in name:
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
    assert trained == sum(p.numel() for name, p in theirs.named_parameters() if "lora" in name)
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
    assert lora.read_json(again / "adapter_config.json") == lora.read_json(
        path / "adapter_config.json"
    )
    (tensors, notes), (expected, said) = (weights.read_tensors(f / name) for f in (again, path))
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
    _, notes = weights.read_tensors(path / "adapter_model.safetensors")
    assert notes["base_sha256"] == identity


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
        ("trainable_token_indices", [3]),
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
    assert lora.LoRAConfig.from_peft(values, where="x").rank == 3


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "dtype"])
def test_tensors_that_do_not_fit_are_named(saved, folder, change):
    _, path = saved
    file = path / "adapter_model.safetensors"
    tensors, notes = weights.read_tensors(file)
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
    weights.write_tensors(file, tensors, notes)
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


def test_the_base_is_taken_at_the_revision_that_the_file_names(saved, monkeypatch, folder):
    _, path = saved
    asked = []
    monkeypatch.setattr(lora.hub, "model_folder", lambda *a: asked.append(a) or folder)
    change_config(path, base_model_name_or_path="user/base", revision="v2")
    assert base_folder(path) == folder
    assert asked == [("user/base", "v2")]
