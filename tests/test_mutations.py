"""The checks of the other test files notice mistakes: each one made here on purpose breaks one."""

import functools
import importlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import walk
from cached import ragged_difference, random_model, split_difference
from hf_models import TOLERANCE, gradient_difference, logit_difference, token_ids
from minigpt2 import lora
from minigpt2 import model as model_module
from minigpt2.cache import KVCache, LayerCache
from minigpt2.decoding import c_library, c_products, c_step, torch_step
from minigpt2.decoding import cpu_layout as packed
from minigpt2.decoding import cuda_graphs as graphs
from minigpt2.decoding import int8 as quantize
from minigpt2.decoding.drafters import NGramDrafter
from minigpt2.equivalences import WAYS, difference
from minigpt2.errors import InputError, OptionError
from minigpt2.evaluation import scorer as scorer_module
from minigpt2.formats import hugging_face
from minigpt2.formats.peft import Adapter, LoRAConfig
from minigpt2.loss import summed_loss
from minigpt2.model import ACTIVATIONS, GPT2, Block, CausalSelfAttention, GPT2Config
from minigpt2.sampling import SamplingConfig
from minigpt2.system.precision import Precision
from minigpt2.training import blocks
from minigpt2.training.step import accumulate

# `minigpt2.generate` is the function of that name
generate_module = importlib.import_module("minigpt2.generate")
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
    open_files = hugging_face.TensorFiles.open

    def opened(cls, folder):
        tensors = open_files(folder).tensors
        return cls(folder, {name: tensors[rename(name)] for name in tensors})

    patch.setattr(hugging_face.TensorFiles, "open", classmethod(opened))


def with_other_values(patch, change):
    """Change tensors as they are read."""
    open_files = hugging_face.TensorFiles.open

    def changed(name, stored):
        return stored._replace(read=lambda: change(name, stored.read()))

    def opened(cls, folder):
        tensors = open_files(folder).tensors
        return cls(folder, {name: changed(name, stored) for name, stored in tensors.items()})

    patch.setattr(hugging_face.TensorFiles, "open", classmethod(opened))


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
    patch.setattr(hugging_face, "TRANSPOSED", re.compile(r"(c_attn|c_fc|mlp\.c_proj)\.weight$"))


@mutation(n_inner=64)
def mlp_not_transposed(patch):
    patch.setattr(hugging_face, "TRANSPOSED", re.compile(r"attn\.(c_attn|c_proj)\.weight$"))


@mutation(refused=True)
def token_embedding_transposed_too(patch):
    patch.setattr(hugging_face, "TRANSPOSED", re.compile(r"(c_attn|c_proj|c_fc|wte)\.weight$"))


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
    patch.setattr(hugging_face, "MASKS", re.compile(r".*attn\.bias$"))  # takes c_attn.bias along


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


def upcast_undone_by_autocast(patch):
    def attend(self, q, k, v, mask):
        wide = (part.float() if self.upcast else part for part in (q, k, v))
        return self.softmax_attention(*wide, mask).to(q.dtype)

    patch.setattr(CausalSelfAttention, "attend", attend)


def autocast_difference(folder):
    """How far attention that upcasts is under autocast from what it is without."""
    attention = GPT2.from_pretrained(folder).h[0].attn
    parts = torch.randn(3, 2, 4, 23, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attention.attend(*parts, None)
    return difference(found, attention.attend(*parts, None))


def test_the_check_of_upcast_attention_notices(hf_folder, monkeypatch):
    folder = hf_folder(reorder_and_upcast_attn=True)
    assert autocast_difference(folder) == 0
    upcast_undone_by_autocast(monkeypatch)
    assert autocast_difference(folder) > MARGIN


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


# ways to compute that are not the plain one


WAY_MUTATIONS = []


def in_ways(*cases):
    """Put a mistake on the list; `cases` are the (way, folder) in which the walk must notice it."""

    def add(make):
        WAY_MUTATIONS.extend((make, *case) for case in cases)
        return make

    return add


@in_ways(("int8 in C", "tied"), ("float32 in C", "untied"), ("float16 in C", "float16"))
def matrices_read_transposed_by_c(patch):
    def matrix(self):
        n, k = self.weight.shape
        turned = self.weight.T.contiguous()
        self.kept = turned  # for as long as it is read
        addresses = map(c_products.address, (turned, self.scale, self.bias))
        return c_products.Matrix(*addresses, n, k, c_products.KINDS[turned.dtype])

    patch.setattr(c_products.CLinear, "matrix", matrix)


@in_ways(("int8 in C", "tied"), ("float32 in C", "tied"))
def two_rows_of_a_product_in_c_swapped(patch):
    forward = c_products.CLinear.forward
    patch.setattr(c_products.CLinear, "forward", lambda self, x: forward(self, x.flip(-2)))


@in_ways(("decode step in C", "tied"), ("decode step in C", "float16"))
def the_second_layer_norm_of_the_step_in_c_forgotten(patch):
    block_of = c_step._block

    def swapped(block):
        found = block_of(block)
        found.ln_2 = found.ln_1
        return found

    patch.setattr(c_step, "_block", swapped)


@in_ways(("decode step in C", "tied"))
def the_cache_of_another_layer_used_by_the_step_in_c(patch):
    slots = c_step._slots
    first = {}

    def same(layer):
        return slots(first.setdefault(layer.keys.data_ptr() == 0, layer))

    patch.setattr(c_step, "_slots", same)


@in_ways(("decode step in C", "untied"))
def the_step_in_c_with_another_activation(patch):
    patch.setattr(c_step, "_activation", lambda model: 2)


@in_ways(("decode step in torch", "tied"), ("float32 by rows", "untied"))
def the_second_layer_norm_of_the_step_in_torch_forgotten(patch):
    functions = torch_step._functions

    def swapped(block, n_tokens):
        found = functions(block, n_tokens)
        return found._replace(ln_2=found.ln_1)

    patch.setattr(torch_step, "_functions", swapped)


@in_ways(("decode step in torch", "tied"))
def the_newest_token_unseen_by_the_step_in_torch(patch):
    gather = torch_step._gather

    def blind(qkv, layer, mask, scale):
        if mask is None:
            layer = layer._replace(n_slots=layer.n_slots - 1)
        return gather(qkv, layer, mask, scale)

    patch.setattr(torch_step, "_gather", blind)


@in_ways(("float32 by rows", "tied"))
def the_layout_for_more_rows_of_another_matrix(patch):
    first = {}

    def other(self, n_rows, for_rows=packed.LinearByRows.for_rows):
        return for_rows(first.setdefault((self.weight.shape, n_rows > 1), self), n_rows)

    patch.setattr(packed.LinearByRows, "for_rows", other)


@in_ways(("int8", "tied"), ("int8", "float16"))
def int8_scales_of_the_row_before(patch):
    def shifted(weight, round_rows=quantize.round_rows):
        steps, scale = round_rows(weight)
        return steps, scale.roll(1)

    patch.setattr(quantize, "round_rows", shifted)


@in_ways(("packed int8", "tied"))
def int8_activations_of_one_digit(patch):
    patch.setattr(packed, "SPLIT", 1e6)


@in_ways(("packed int8", "tied"), ("packed int8", "untied"))
def int8_activations_cut_off_at_255(patch):
    patch.setattr(packed, "ZERO_POINT", 220)


@in_ways(("packed float32", "tied"), ("packed float32", "float16"))
def packed_biases_forgotten(patch):
    init = packed.PackedLinear.__init__

    def without(self, linear):
        init(self, linear)
        self.bias = None

    patch.setattr(packed.PackedLinear, "__init__", without)


@in_ways(("plain float32", "tied"), ("sliced float32", "untied"))
def plain_biases_forgotten(patch):
    init = packed.PlainLinear.__init__

    def without(self, linear):
        init(self, linear)
        self.bias = None

    patch.setattr(packed.PlainLinear, "__init__", without)


@in_ways(("sliced float32", "tied"))
def slices_of_a_matrix_in_another_order(patch):
    bmm = torch.bmm
    patch.setattr(packed.torch, "bmm", lambda slices, rows: bmm(slices.flip(0), rows))


@in_ways(("deferred weights", "tied"), ("packed float32", "tied"))
def head_of_deferred_weights_off_by_a_row(patch):
    skeleton = model_module.skeleton

    def shifted(folder, *, own_head=False, **options):
        model, files = skeleton(folder, own_head=own_head, **options)
        if own_head:
            head = files.tensors[hugging_face.HEAD]
            files.tensors[hugging_face.HEAD] = head._replace(read=lambda: head.read().roll(1, 0))
        return model, files

    patch.setattr(model_module, "skeleton", shifted)


@in_ways(("fixed shapes", "tied"))
def all_slots_seen_in_fixed_shapes(patch):
    def unmasked(self, positions, all_slots=KVCache.all_slots):
        mask, layers = all_slots(self, positions)
        return torch.ones_like(mask), layers

    patch.setattr(KVCache, "all_slots", unmasked)


@in_ways(("fixed shapes", "tied"))
def positions_of_the_first_row_in_fixed_shapes(patch):
    def first(self, idx, positions, cache, run=graphs.FixedDecodeStep._run):
        return run(self, idx, positions[:1].expand_as(positions), cache)

    patch.setattr(graphs.FixedDecodeStep, "_run", first)


@in_ways(("LoRA beside", "LoRA"), ("LoRA folded", "LoRA"), ("peft's adapter", "peft"))
def lora_scale_ignored(patch):
    patch.setattr(LoRAConfig, "scale", property(lambda self: 1.0))


@in_ways(("LoRA folded", "LoRA"), ("peft's adapter", "peft"))
def lora_folded_twice(patch):
    def twice(self, name, weight, folded=Adapter.folded):
        return folded(self, name, folded(self, name, weight))

    patch.setattr(Adapter, "folded", twice)


@in_ways(("LoRA beside", "LoRA"))
def lora_beside_the_first_matrix_only(patch):
    def first(self, input, forward=lora.LoRALinear.forward):
        is_first = self.out_features == 3 * self.in_features
        return (forward if is_first else nn.Linear.forward)(self, input)

    patch.setattr(lora.LoRALinear, "forward", first)


def noticed(way, folder):
    """Whether the walk of a way fails for one of the places where users meet it."""
    for make in {**walk.MODELS, **walk.ADAPTERS}[way]:
        twin = walk.added_by_hand if way in walk.ADAPTERS else walk.TWINS[WAYS[way].twin]
        try:
            model = make(folder)
        except OptionError:  # a routine that is not to be had
            return True
        goes = walk.goes(model, way) or way in walk.UNMARKED
        if not goes or walk.worst(model, twin(folder))[0] > WAYS[way].tolerance:
            return True
    return False


@pytest.mark.parametrize(
    ("make", "way", "name"),
    WAY_MUTATIONS,
    ids=lambda value: getattr(value, "__name__", None) or value.replace(" ", "-"),
)
def test_the_walk_of_the_ways_notices(walked_folders, monkeypatch, tmp_path, make, way, name):
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path / "cache"))
    if noticed(way, walked_folders[name]):
        pytest.skip(f"{way} is not to be had on this machine")
    make(monkeypatch)
    # the look at a routine before it is used notices some by itself
    monkeypatch.setattr(packed, "works", lambda *_: True)
    monkeypatch.setattr(packed, "c_works", lambda _: c_library.library() is not None)
    assert noticed(way, walked_folders[name])


def every_guess_kept(patch):
    def kept(guesses, probs, generators):
        return [[*guess.ids, int(p[len(guess.ids)].argmax())] for guess, p in zip(guesses, probs)]

    patch.setattr(generate_module, "accept", kept)


def guesses_checked_by_the_place_before(patch):
    accept = generate_module.accept

    def shifted(guesses, probs, generators):
        return accept(guesses, torch.cat((probs[:, :1], probs[:, :-1]), 1), generators)

    patch.setattr(generate_module, "accept", shifted)


def wrong_guesses_left_in_the_cache(patch):
    truncate = KVCache.truncate

    def longer(self, lengths):
        truncate(self, [min(n + 1, int(m)) for n, m in zip(lengths, self.lengths)])

    patch.setattr(KVCache, "truncate", longer)


GUESS_MUTATIONS = [
    every_guess_kept,
    guesses_checked_by_the_place_before,
    wrong_guesses_left_in_the_cache,
]


@pytest.mark.parametrize("make", GUESS_MUTATIONS)
def test_the_walk_of_guesses_notices(walked_folders, monkeypatch, make):
    model = walk.plain(walked_folders["tied"])
    rows = [[5], [7, 9, 200], [5, 6, 5, 6, 5]]
    options = {"max_new_tokens": 70, "sampling": SamplingConfig(0)}
    expected = generate_module.generate(model, rows, **options)
    drafter = NGramDrafter(shortest=1)
    assert generate_module.generate(model, rows, drafter=drafter, **options) == expected
    make(monkeypatch)
    try:
        found = generate_module.generate(model, rows, drafter=drafter, **options)
    except AssertionError:
        return
    assert found != expected


def last_chunk_of_the_loss_left_out(patch):
    def shorter(x, weight, targets, scale=1.0):
        targets = targets.flatten(0, -1).clone()
        targets[-7:] = -100
        return summed_loss(x, weight, targets, scale, most=len(weight) * 7)

    patch.setattr(scorer_module, "summed_loss", shorter)


def recomputed_blocks_with_other_dropout(patch):
    patch.setattr(
        blocks, "checkpoint", functools.partial(blocks.checkpoint, preserve_rng_state=False)
    )


def blocks_compiled_without_their_residual(patch):
    patch.setattr(
        torch,
        "compile",
        lambda forward: lambda x, *rest: forward(x, *rest) - x,  # as if fused away
    )


TRAINING_MUTATIONS = {
    last_chunk_of_the_loss_left_out: {},
    recomputed_blocks_with_other_dropout: {"recomputed": True},
    blocks_compiled_without_their_residual: {"compiled": True},
}


def gradients_of_a_step(*, recomputed=False, compiled=False):
    """The loss and gradients of a step with dropout, as train.py takes it."""
    config = GPT2Config(vocab_size=37, block_size=13, n_embd=14, n_layer=2, n_head=2)
    model = GPT2(config, generator=torch.Generator().manual_seed(1)).train()
    precision = Precision(torch.device("cpu"), torch.float32)
    blocks.prepare_blocks(model, precision, (2, 13), compiled=compiled, recomputed=recomputed)
    idx = token_ids(37, 4, 14)
    batch = idx[:, :-1], idx[:, 1:]
    loss = accumulate(scorer_module.Scorer(model), batch, precision, 2, seed=3)
    gradients = [parameter.grad.flatten() for parameter in model.parameters()]
    return torch.cat([torch.tensor([loss]), *gradients])


@pytest.mark.parametrize("make", TRAINING_MUTATIONS)
def test_the_walk_of_training_notices(monkeypatch, make):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    options = TRAINING_MUTATIONS[make]
    plain = gradients_of_a_step()
    assert torch.equal(gradients_of_a_step(**options), plain)
    make(monkeypatch)
    assert difference(gradients_of_a_step(**options), plain) > MARGIN
