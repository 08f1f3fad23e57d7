"""Adapters start as nothing, train alone, and fold in and out."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from adapted import CONFIG, IDX, adapted, assert_same, base, distance, logits, states
from hf_models import next_token_loss, reference
from minigpt2.errors import InputError
from minigpt2.formats.peft import TARGETS
from minigpt2.lora import adapters, add_lora, base_identity, has_lora, merge, merged, unmerge
from minigpt2.model import GPT2, GPT2Config

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
