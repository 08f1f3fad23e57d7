"""The checks of the other test files notice mistakes: each one made here on purpose breaks one."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from hf_models import TOLERANCE, gradient_difference, logit_difference, token_ids
from minigpt2 import model as model_module
from minigpt2 import weights
from minigpt2.cache import KVCache, LayerCache
from minigpt2.errors import InputError
from minigpt2.model import ACTIVATIONS, GPT2, Block, CausalSelfAttention, GPT2Config
from test_cache import ragged_difference, random_model, split_difference

MARGIN = 1e-4  # a million times what the checks tolerate
MUTATIONS = []


@dataclass(frozen=True)
class Mutation:
    """A mistake made with monkeypatch, the config values of a model that shows it, and whether the
    loader itself refuses it.
    """

    make: Callable[[pytest.MonkeyPatch], None]
    values: dict
    refused: bool

    def __str__(self):
        return self.make.__name__


def mutation(*, refused=False, **values):
    """Put a mistake on the list; `values` change the config of the model it is looked for in."""

    def add(make):
        MUTATIONS.append(Mutation(make, values, refused))
        return make

    return add


def in_loaded_models(patch, change):
    """Do something to every model once it is loaded."""
    load = GPT2.from_pretrained

    def from_pretrained(cls, *args, **options):
        model = load(*args, **options)
        with torch.no_grad():
            change(model)
        return model

    patch.setattr(GPT2, "from_pretrained", classmethod(from_pretrained))


def in_attention(patch, change):
    def change_all(model):
        for i, block in enumerate(model.h):
            change(block.attn, i)

    in_loaded_models(patch, change_all)


def under_other_names(patch, rename):
    """Read each tensor from where another one lies."""
    open_files = weights.TensorFiles.open

    def opened(cls, folder):
        tensors = open_files(folder).tensors
        return cls(folder, {name: tensors[rename(name)] for name in tensors})

    patch.setattr(weights.TensorFiles, "open", classmethod(opened))


def with_other_values(patch, change):
    """Change tensors as they are read."""
    open_files = weights.TensorFiles.open

    def changed(name, stored):
        return stored._replace(read=lambda: change(name, stored.read()))

    def opened(cls, folder):
        tensors = open_files(folder).tensors
        return cls(folder, {name: changed(name, stored) for name, stored in tensors.items()})

    patch.setattr(weights.TensorFiles, "open", classmethod(opened))


def with_config(patch, **values):
    read = GPT2Config.from_hf.__func__

    def from_hf(cls, given, *, where="config.json"):
        return read(cls, {**given, **values}, where=where)

    patch.setattr(GPT2Config, "from_hf", classmethod(from_hf))


@mutation()
def gelu_by_the_error_function(patch):
    patch.setitem(ACTIVATIONS, "gelu_new", F.gelu)


@mutation()
def gelu_by_the_sigmoid(patch):
    patch.setitem(ACTIVATIONS, "gelu_new", lambda x: x * torch.sigmoid(1.702 * x))


@mutation(activation_function="gelu")
def activation_of_the_config_ignored(patch):
    with_config(patch, activation_function="gelu_new")


@mutation()
def layer_norm_epsilon_of_1e_6(patch):
    with_config(patch, layer_norm_epsilon=1e-6)


@mutation()
def layer_norm_epsilon_of_1e_12(patch):
    with_config(patch, layer_norm_epsilon=1e-12)


@mutation(layer_norm_epsilon=1e-3)
def layer_norm_epsilon_of_the_config_ignored(patch):
    with_config(patch, layer_norm_epsilon=1e-5)


@mutation()
def attention_projection_not_transposed(patch):
    patch.setattr(weights, "TRANSPOSED", re.compile(r"(c_attn|c_fc|mlp\.c_proj)\.weight$"))


@mutation(n_inner=64)
def mlp_not_transposed(patch):
    patch.setattr(weights, "TRANSPOSED", re.compile(r"attn\.(c_attn|c_proj)\.weight$"))


@mutation(refused=True)
def token_embedding_transposed_too(patch):
    patch.setattr(weights, "TRANSPOSED", re.compile(r"(c_attn|c_proj|c_fc|wte)\.weight$"))


@mutation()
def layer_norms_of_a_block_swapped(patch):
    other = {".ln_1.": ".ln_2.", ".ln_2.": ".ln_1."}
    under_other_names(patch, lambda name: re.sub(r"\.ln_.\.", lambda part: other[part[0]], name))


@mutation()
def layers_in_the_order_of_their_names_as_text(patch):
    order = sorted(map(str, range(12)))
    under_other_names(
        patch, lambda name: re.sub(r"^h\.(\d+)", lambda part: f"h.{order[int(part[1])]}", name)
    )


@mutation()
def all_biases_dropped(patch):
    with_other_values(patch, lambda name, x: x * 0 if name.endswith("bias") else x)


@mutation()
def attention_biases_dropped(patch):
    with_other_values(patch, lambda name, x: x * 0 if name.endswith("c_attn.bias") else x)


@mutation()
def layer_norm_biases_dropped(patch):
    with_other_values(patch, lambda name, x: x * 0 if re.search(r"ln_.\.bias$", name) else x)


@mutation()
def query_and_key_biases_swapped(patch):
    def change(name, x):
        return x.view(3, -1)[[1, 0, 2]].flatten() if name.endswith("c_attn.bias") else x

    with_other_values(patch, change)


@mutation()
def weights_rounded_to_float16(patch):
    with_other_values(patch, lambda name, x: x.half())


@mutation()
def weights_rounded_to_bfloat16(patch):
    with_other_values(patch, lambda name, x: x.bfloat16())


@mutation(refused=True)
def masks_known_by_the_end_of_their_names(patch):
    patch.setattr(weights, "MASKS", re.compile(r".*attn\.bias$"))  # takes c_attn.bias along


@mutation()
def attention_not_scaled(patch):
    in_attention(patch, lambda attention, i: setattr(attention, "scale", 1.0))


@mutation()
def attention_scaled_by_the_width_of_the_model(patch):
    in_attention(patch, lambda attention, i: setattr(attention, "scale", 1 / math.sqrt(64)))


@mutation()
def attention_scaled_twice(patch):
    in_attention(patch, lambda attention, i: setattr(attention, "scale", attention.scale**2))


@mutation(scale_attn_weights=False)
def scale_attn_weights_ignored(patch):
    with_config(patch, scale_attn_weights=True)


@mutation(scale_attn_by_inverse_layer_idx=True)
def scale_attn_by_inverse_layer_idx_ignored(patch):
    with_config(patch, scale_attn_by_inverse_layer_idx=False)


@mutation(scale_attn_by_inverse_layer_idx=True)
def inverse_layer_idx_off_by_one(patch):
    in_attention(
        patch, lambda attention, i: setattr(attention, "scale", attention.scale * (i + 1) / (i + 2))
    )


@mutation()
def half_as_many_heads(patch):
    with_config(patch, n_head=2)


@mutation(refused=True, n_inner=96)
def n_inner_ignored(patch):
    with_config(patch, n_inner=None)


@mutation(tie_word_embeddings=False)
def own_head_ignored(patch):
    in_loaded_models(patch, lambda model: model.lm_head.weight.copy_(model.wte.weight))


@mutation()
def queries_and_keys_swapped(patch):
    attend = CausalSelfAttention.attend
    patch.setattr(
        CausalSelfAttention, "attend", lambda self, q, k, v, mask: attend(self, k, q, v, mask)
    )


@mutation()
def heads_packed_before_queries_keys_and_values(patch):
    packed_as(patch, "(n h d)", "(h n d)")


@mutation()
def head_size_packed_before_heads(patch):
    packed_as(patch, "(n h d)", "(n d h)")


@mutation()
def heads_joined_the_wrong_way_round(patch):
    packed_as(patch, "b t (h d)", "b t (d h)")


def packed_as(patch, right, wrong):
    rearrange = model_module.rearrange

    def other(x, pattern, **sizes):
        return rearrange(x, pattern.replace(right, wrong), **sizes)

    patch.setattr(model_module, "rearrange", other)


def seen(patch, visible):
    """Let attention see what `visible` (T, T) makes of a full mask."""

    def attend(self, q, k, v, mask):
        allowed = visible(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=self.scale)

    patch.setattr(CausalSelfAttention, "attend", attend)


@mutation()
def the_next_token_seen(patch):
    seen(patch, lambda full: full.tril(1))


@mutation()
def all_tokens_seen(patch):
    seen(patch, lambda full: full)


@mutation()
def the_token_itself_not_seen(patch):
    seen(patch, lambda full: full.tril(-1))


@mutation()
def only_the_last_32_tokens_seen(patch):
    seen(patch, lambda full: full.tril().triu(-31))


@mutation()
def positions_off_by_one(patch):
    in_loaded_models(patch, lambda model: model.wpe.weight.copy_(model.wpe.weight.roll(1, 0)))


@mutation()
def positions_ignored(patch):
    in_loaded_models(patch, lambda model: model.wpe.weight.zero_())


@mutation()
def last_layer_missing(patch):
    in_loaded_models(patch, lambda model: setattr(model, "h", model.h[:-1]))


@mutation()
def final_layer_norm_missing(patch):
    in_loaded_models(patch, lambda model: setattr(model, "ln_f", nn.Identity()))


@mutation()
def layer_norm_after_the_sublayer(patch):
    def forward(self, x, mask, cache):
        x = self.ln_1(x + self.attn(x, mask, cache))
        return self.ln_2(x + self.mlp(x))

    patch.setattr(Block, "forward", forward)


@mutation()
def attention_and_mlp_side_by_side(patch):
    def forward(self, x, mask, cache):
        return x + self.attn(self.ln_1(x), mask, cache) + self.mlp(self.ln_2(x))

    patch.setattr(Block, "forward", forward)


@mutation()
def mlp_without_its_residual(patch):
    def forward(self, x, mask, cache):
        return self.mlp(self.ln_2(x + self.attn(self.ln_1(x), mask, cache)))

    patch.setattr(Block, "forward", forward)


@mutation()
def one_layer_norm_for_both_sublayers(patch):
    def forward(self, x, mask, cache):
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_1(x))

    patch.setattr(Block, "forward", forward)


@mutation()
def dropout_left_on(patch):
    in_loaded_models(patch, lambda model: model.train())


@mutation()
def head_not_tied(patch):
    patch.setattr(GPT2, "head", lambda self, x: F.linear(x, self.wte.weight.roll(1, 0)))


@pytest.mark.parametrize("mutation", [m for m in MUTATIONS if not m.refused], ids=str)
def test_the_parity_check_notices(hf_folder, monkeypatch, mutation):
    folder = hf_folder(**mutation.values)
    torch.manual_seed(0)  # for dropout_left_on
    mutation.make(monkeypatch)
    assert not logit_difference(folder) < MARGIN


@pytest.mark.parametrize("mutation", [m for m in MUTATIONS if m.refused], ids=str)
def test_the_loader_notices(hf_folder, monkeypatch, mutation):
    folder = hf_folder(**mutation.values)
    mutation.make(monkeypatch)
    with pytest.raises(InputError, match=r"do not fit its config\.json"):
        logit_difference(folder)


@pytest.mark.parametrize(
    "values", list({str(m.values): m.values for m in MUTATIONS}.values()), ids=str
)
def test_the_parity_check_passes_without_a_mutation(hf_folder, values):
    assert logit_difference(hf_folder(**values)) <= TOLERANCE


def attention_detached(patch):
    attend = CausalSelfAttention.attend
    patch.setattr(
        CausalSelfAttention, "attend",
        lambda self, q, k, v, mask: attend(self, q.detach(), k, v, mask),
    )  # fmt: skip


def head_detached(patch):
    patch.setattr(GPT2, "head", lambda self, x: F.linear(x, self.wte.weight.detach()))


def norm_detached(patch):
    def forward(self, x, mask, cache):
        x = x + self.attn(self.ln_1(x.detach()), mask, cache)
        return x + self.mlp(self.ln_2(x))

    patch.setattr(Block, "forward", forward)


@pytest.mark.parametrize("make", [attention_detached, head_detached, norm_detached])
def test_the_gradient_check_notices_what_logits_do_not_show(hf_folder, monkeypatch, make):
    make(monkeypatch)
    assert logit_difference(hf_folder()) <= TOLERANCE
    assert gradient_difference(hf_folder()) > MARGIN


def positions_restart_with_every_call(patch):
    patch.setattr(
        KVCache, "positions", lambda self, n: torch.arange(n).expand(len(self.lengths), n)
    )


def positions_of_the_longest_row(patch):
    def positions(self, n_tokens):
        return (self.lengths.max() + torch.arange(n_tokens)).expand(len(self.lengths), n_tokens)

    patch.setattr(KVCache, "positions", positions)


def mask_of_the_upper_left_corner(patch):
    def mask(self, positions):
        return (
            torch.ones(positions.shape[1], self._slots_after(positions)).bool().tril()[None, None]
        )

    patch.setattr(KVCache, "mask", mask)


def mask_of_the_longest_row(patch):
    mask = KVCache.mask
    patch.setattr(KVCache, "mask", lambda self, positions: mask(self, positions.amax(0)[None]))


def mask_without_the_token_itself(patch):
    mask = KVCache.mask
    patch.setattr(KVCache, "mask", lambda self, positions: mask(self, positions - 1))


def keys_written_to_the_first_rows_slots(patch):
    append = LayerCache.append

    def shared(self, k, v):
        return append(self._replace(positions=self.positions[:1].expand_as(self.positions)), k, v)

    patch.setattr(LayerCache, "append", shared)


def truncation_of_every_row_to_the_longest(patch):
    truncate = KVCache.truncate
    patch.setattr(
        KVCache, "truncate", lambda self, lengths: truncate(self, [max(lengths)] * len(lengths))
    )


CACHE_MUTATIONS = [
    positions_restart_with_every_call,
    positions_of_the_longest_row,
    mask_of_the_upper_left_corner,
    mask_of_the_longest_row,
    mask_without_the_token_itself,
    keys_written_to_the_first_rows_slots,
    truncation_of_every_row_to_the_longest,
]


def cache_difference():
    """What the two checks of test_cache find, split calls and ragged rows."""
    model, idx = random_model(), token_ids(31, 3, 23)
    return max(split_difference(model, idx, {8, 9}), ragged_difference(model, idx, [1, 5, 9]))


def test_the_cache_checks_pass_without_a_mutation():
    assert cache_difference() <= 1e-12


@pytest.mark.parametrize("make", CACHE_MUTATIONS)
def test_the_cache_checks_notice(monkeypatch, make):
    make(monkeypatch)
    assert not cache_difference() < MARGIN
