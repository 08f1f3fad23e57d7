import math

import pytest
import torch
import torch.nn.functional as F

from hf_models import TOLERANCE, randomise, reference, token_ids
from minigpt2 import GPT2, GPT2Config, OptionError
from minigpt2.equivalences import difference
from minigpt2.errors import InputError
from minigpt2.explain import (
    attribution,
    differences,
    induction_scores,
    logit_lens,
    previous_token_scores,
    surprise,
    trace,
)
from minigpt2.lora import add_lora

PRIMES = GPT2Config(vocab_size=31, block_size=13, n_embd=15, n_layer=2, n_head=3, n_inner=17)
IDX = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])


def model_of(dtype=torch.float64, **values):
    model = GPT2(GPT2Config(**{**vars(PRIMES), **values})).to(dtype).eval()
    randomise(model, std=0.4)
    return model


@torch.no_grad()
def test_the_lens_looks_at_every_stream_through_the_end_of_the_model(hf_folder):
    folder = hf_folder()
    theirs, model = reference(folder), GPT2.from_pretrained(folder, dtype=torch.float64)
    idx = token_ids(257, 2, 64)
    expected = theirs(idx, output_hidden_states=True)
    found = logit_lens(model, trace(model, idx), positions=[0, -2, 63])
    assert found.shape == (13, 2, 3, 257)
    for at, stream in zip(found, expected.hidden_states[:-1]):
        through = theirs.lm_head(theirs.transformer.ln_f(stream))[:, [0, 62, 63]]
        assert float((at - through).abs().max()) <= TOLERANCE
    last = logit_lens(model, trace(model, idx))[-1, :, 0]
    assert float((last - expected.logits[:, -1]).abs().max()) <= TOLERANCE


def test_surprise_is_minus_the_log_of_the_probability():
    model = model_of()
    log_probs = trace(model, IDX).logits.log_softmax(-1)
    for row, nats in enumerate(surprise(model, IDX)):
        assert nats[0] is None
        expected = [-log_probs[row, t, IDX[row, t + 1]].item() for t in range(IDX.shape[1] - 1)]
        assert nats[1:] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3), (torch.bfloat16, 0.1)]
)
@pytest.mark.parametrize("values", [{}, {"tie_word_embeddings": False}, {"n_head": 1}], ids=str)
def test_what_moved_a_score_adds_up_to_it(dtype, tolerance, values):
    model = model_of(dtype, **values)
    found = trace(model, IDX)
    for row, position, token in ((0, -1, 5), (1, 3, 30), (1, 0, 0)):
        parts = attribution(model, found, token, position, row)
        assert parts.logit == float(found.logits[row, position, token])
        assert parts.total == pytest.approx(parts.logit, abs=tolerance * max(1, abs(parts.logit)))


@torch.no_grad()
def test_every_part_is_what_the_final_norm_makes_of_one_write_at_the_scale_of_all():
    model = model_of()
    add_lora(model, rank=2, alpha=3)
    randomise(model, std=0.4, seed=4)
    found = trace(model, IDX)
    parts = attribution(model, found, token=7, position=4, row=1)
    stream = found.streams[-1][1, 4]
    sigma = (stream - stream.mean()).square().mean().add(model.ln_f.eps).sqrt()

    def moved(write):
        """How far the score falls when a write is taken out and the scale is held."""

        def score(x):
            return ((x - x.mean()) / sigma * model.ln_f.weight + model.ln_f.bias) @ direction

        direction = model.wte.weight[7]
        return float(score(stream) - score(stream - write))

    for n, (layer, block) in enumerate(zip(found.layers, model.h)):
        assert parts.mlps[n].item() == pytest.approx(moved(layer.mlp[1, 4]), abs=1e-9)
        assert parts.attns[n].item() == pytest.approx(moved(layer.attn[1, 4]), abs=1e-9)
        y = (layer.probs @ layer.v)[1, :, 4]  # (H, D)
        for head in range(3):
            alone = F.pad(y[head], (head * 5, (2 - head) * 5))
            write = block.attn.c_proj(alone) - block.attn.c_proj(torch.zeros_like(alone))
            assert parts.heads[n, head].item() == pytest.approx(moved(write), abs=1e-9)
    assert parts.token_embedding == pytest.approx(moved(found.token_embedding[1, 4]), abs=1e-9)
    positions = moved(found.position_embedding[0, 4])
    assert parts.position_embedding == pytest.approx(positions, abs=1e-9)
    assert parts.final_bias == pytest.approx(float(model.ln_f.bias @ model.wte.weight[7]), abs=1e-9)


def test_places_that_are_not_there_are_refused():
    model = model_of()
    found = trace(model, IDX)
    for arguments, message in (
        ((31,), r"token is 31, allowed is an id from 0 to 30"),
        ((0, 7), r"position is 7, allowed is from -7 to 6"),
        ((0, 0, 2), r"row is 2, allowed is from 0 to 1"),
    ):
        with pytest.raises(OptionError, match=message):
            attribution(model, found, *arguments)
    with pytest.raises(OptionError, match="position is -8"):
        logit_lens(model, found, [-8])


def test_scores_of_heads_are_means_of_the_probabilities_that_they_name():
    model = model_of()
    found = trace(model, IDX)
    previous, induction = previous_token_scores(found), induction_scores(found)
    # the tokens after an earlier occurrence of the one at a place: (row, place, tokens)
    after = [(0, 3, [2]), (1, 3, [2])]
    for n, layer in enumerate(found.layers):
        for head in range(3):
            probs = layer.probs[:, head]
            expected = sum(float(probs[b, t, t - 1]) for b in range(2) for t in range(1, 7)) / 12
            assert previous[n, head].item() == pytest.approx(expected)
            expected = sum(float(probs[b, t, s]) for b, t, places in after for s in places) / 2
            assert induction[n, head].item() == pytest.approx(expected)


def test_a_head_that_goes_on_as_the_text_did_scores_one():
    # one head whose queries and keys are made by hand: place t of the second half asks for the
    # token after its earlier occurrence, which positions alone can tell here
    length = 6
    model = model_of(n_layer=1, n_head=1, n_embd=16, block_size=13)
    half = torch.arange(length)
    idx = torch.cat([half, half])[None]
    block = model.h[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        block.ln_1.weight.fill_(1)
        model.wpe.weight[:13, :13] = torch.eye(13) * 100
        shift = torch.zeros(16, 16)
        for t in range(length, 2 * length):
            shift[t - length + 1, t] = 1  # from the place that asks to the one asked for
        block.attn.c_attn.weight[:16] = shift * 100
        block.attn.c_attn.weight[16:32] = torch.eye(16) * 100
    scores = induction_scores(trace(model, idx))
    assert scores.item() == pytest.approx(1, abs=1e-6)
    assert previous_token_scores(trace(model, idx)).item() < 0.5


def test_texts_without_what_is_measured_have_no_score():
    model = model_of()
    assert torch.isnan(induction_scores(trace(model, torch.tensor([[1, 2, 3]])))).all()
    assert torch.isnan(previous_token_scores(trace(model, torch.tensor([[1]])))).all()
    assert math.isfinite(difference(model(IDX), model(IDX)))


@pytest.mark.parametrize("idx", [[1, 2], torch.zeros(3, dtype=torch.int64),
                                 torch.zeros(1, 0, dtype=torch.int64),
                                 torch.zeros(0, 3, dtype=torch.int64)], ids=str)  # fmt: skip
def test_what_holds_no_tokens_is_refused_alike_by_all(idx):
    model = GPT2(GPT2Config(vocab_size=11, block_size=7, n_embd=6, n_layer=1, n_head=2))
    for measure in (trace, surprise, lambda model, idx: differences(model, model, idx)):
        with pytest.raises(InputError, match=r"^idx .*allowed is|^idx .*\(B, T\)"):
            measure(model, idx)
