"""GPT-2: the network, from one attention head to the whole. Read from top to bottom.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; openai/gpt-2 model.py.
Modules carry the names of the published weights (wte, wpe, h.0.attn.c_attn, ...), so a weight file
reads like this file. The loss is the caller's, and so are training, decoding, LoRA and
quantisation: they act on the model from outside.

Letters: B batch, T tokens in this call, S positions seen (cached + T), C n_embd, H heads, D head
size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .arguments import check_types, refuse, require, shown, whole
from .cache import KVCache, LayerCache
from .equivalences import FIXED_WAYS, ways_of
from .errors import InputError, OptionError
from .formats import hugging_face
from .formats.activations import ACTIVATIONS
from .system.precision import as_device, as_dtype, by_name

if TYPE_CHECKING:
    from .formats.hugging_face import ModelFolder, TensorFiles
    from .tokenizer import Tokenizer

# Sizes beyond which a configuration is a mistake, said before anything is built. The deepest
# transformers that were trained have 1,000 layers (DeepNet, arXiv:2203.00555); 2^40 parameters
# would take 4 TB in float32, 700 times as much as the largest GPT-2.
MOST_LAYERS, MOST_PARAMETERS = 1024, 2**40


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2 and what else changes its mathematics; the defaults are the 124M model.

    Raises InputError for values that make no network.
    """

    vocab_size: int = 50257
    block_size: int = 1024  # longest context; `n_positions` in Hugging Face's config.json
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # width of the MLP; None is 4 * n_embd
    activation_function: str = "gelu_new"
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("vocab_size", "block_size", "n_embd", "n_layer", "n_head", "n_inner"):
            value = getattr(self, name)
            ok = value is None or 1 <= value < 2**31
            require(name, value, ok, "1 or more (and below 2^31)")
        require("n_layer", self.n_layer, self.n_layer <= MOST_LAYERS, f"1 to {MOST_LAYERS}")
        if self.n_parameters > MOST_PARAMETERS:
            names = ("vocab_size", "block_size", "n_embd", "n_inner")
            sizes = {name: getattr(self, name) or 0 for name in names}
            largest = max(sizes, key=lambda name: sizes[name])
            raise OptionError(
                f"{largest} is {sizes[largest]}, which makes {self.n_parameters:,} parameters, "
                "allowed are 2^40",
                largest,
            )
        for name in ("layer_norm_epsilon", "initializer_range"):
            require(name, getattr(self, name), 0 < getattr(self, name) < 1, "between 0 and 1")
        if self.n_embd % self.n_head:
            raise OptionError(
                f"n_head is {self.n_head}, which does not divide n_embd {self.n_embd}", "n_head"
            )
        if self.activation_function not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise OptionError(
                f"activation_function is {shown(self.activation_function)}, known are {known}",
                "activation_function",
            )
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
            value = getattr(self, name)
            require(name, value, 0 <= value < 1, "from 0 to below 1")

    @property
    def head_size(self) -> int:
        """D: the width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def block_parameters(self) -> int:
        """How many numbers one block has."""
        width, inner = self.n_embd, self.n_inner or 4 * self.n_embd
        return 4 * width**2 + 2 * width * inner + 9 * width + inner

    @property
    def n_parameters(self) -> int:
        """How many numbers the model has; a tied head counts once."""
        n_tables = 1 if self.tie_word_embeddings else 2
        outside = (n_tables * self.vocab_size + self.block_size + 2) * self.n_embd
        return outside + self.n_layer * self.block_parameters

    @classmethod
    def from_hf(cls, values: dict, *, where: str = "config.json") -> GPT2Config:
        """Read the dictionary of a Hugging Face config.json; InputError names `where` and the field
        at fault.
        """
        known = hugging_face.read_config_fields(values, cls, where)
        try:
            return cls(**known)
        except OptionError as problem:
            name = problem.names[0]
            complaint = str(problem).removeprefix(name)
            raise InputError(
                f"{where}: {hugging_face.name_in(values, name)}{complaint}"
            ) from problem

    def to_hf(self) -> dict:
        """The same configuration under Hugging Face's names."""
        return {
            hugging_face.hf_name(field.name): getattr(self, field.name) for field in fields(self)
        }


PRESETS: dict[str, GPT2Config] = {
    # two minutes of training stay far from over-fitting, and dropout costs a third more time
    "nano": GPT2Config(
        vocab_size=2048,
        block_size=128,
        n_embd=128,
        n_layer=4,
        n_head=4,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
    ),
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "distilgpt2": GPT2Config(n_layer=6),
}


def attention_probs(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """How much each token attends to every token that it may see, (B, H, T, S): rows sum to 1.

    q (B, H, T, D), k (B, H, S, D), mask (..., T, S) or None: the tokens before and itself.
    """
    n_new, n_seen = q.shape[2], k.shape[2]  # T, S
    if mask is None:
        mask = torch.ones(n_new, n_seen, dtype=torch.bool, device=q.device).tril(n_seen - n_new)
    scores = (q * scale) @ k.transpose(2, 3)  # (B, H, T, S)
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)


class CausalSelfAttention(nn.Module):
    """Every token gathers from itself and the tokens before it what fits its question (query)."""

    def __init__(self, config: GPT2Config, layer_index: int) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.upcast = config.reorder_and_upcast_attn
        self.scale = 1 / math.sqrt(config.head_size) if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer_index + 1
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.attn_pdrop = config.attn_pdrop
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        """x (B, T, C) -> (B, T, C).

        mask (B, 1, T, S) comes with a cache, or where documents are kept apart; without one, the
        mask is causal and T = S, or T = 1 and everything is visible.
        """
        q, k, v = rearrange(self.c_attn(x), "b t (n h d) -> n b h t d", n=3, h=self.n_head)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, S, D)
        y = self.attend(q, k, v, mask)  # (B, H, T, D)
        return self.resid_dropout(self.c_proj(rearrange(y, "b h t d -> b t (h d)")))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(q k^T * scale, where visible) v, in float32 where the config asks for it.

        q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D).
        """
        if not self.upcast:
            return self.softmax_attention(q, k, v, mask)
        wide = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):  # which would cast them back
            y = self.softmax_attention(q.to(wide), k.to(wide), v.to(wide), mask)
        return y.to(q.dtype)

    def plain_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """What `softmax_attention` computes, written out to be read, and for tests to compare with;
        Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1.
        """
        probs = attention_probs(q, k, mask, self.scale)  # (B, H, T, S)
        return F.dropout(probs, self.attn_pdrop, self.training) @ v  # (B, H, T, D)

    def softmax_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """`plain_attention` in one fused call, in the precision that q, k and v have.

        The (T, S) scores are never held in memory, except on the CPU with dropout.
        """
        # without a mask T = S, or T = 1: PyTorch aligns a causal mask to the upper left corner
        causal = mask is None and bool(q.shape[2] == k.shape[2])  # of an export they are symbols
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.attn_pdrop if self.training else 0.0,
            is_causal=causal,
            scale=self.scale,
        )


class MLP(nn.Module):
    """Every token thinks by itself about what it gathered."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, n_inner)
        self.act = ACTIVATIONS[config.activation_function]
        self.c_proj = nn.Linear(n_inner, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    """Gather, then think: each reads the residual stream through a layer norm and adds to it."""

    def __init__(self, config: GPT2Config, layer_index: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config, layer_index)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """Token ids in, the scores of every next token out."""

    def __init__(self, config: GPT2Config, *, generator: torch.Generator | None = None) -> None:
        """Random weights, drawn from `generator` or from torch's global one."""
        super().__init__()
        self.config = config
        self.wte = _embedding(config.vocab_size, config.n_embd)
        self.wpe = _embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if not self.wte.weight.is_meta:  # "meta" has shapes only: the loader brings the values
            self.init_weights(generator)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """GPT-2's start: matrices N(0, 0.02), biases 0, layer norms 1.

        The two projections that write to the residual stream of each block start smaller by sqrt(2
        n_layer), the number of writes, so that their sum keeps its size (GPT-2 paper, section 2.3).
        """
        n_writes = 2 * self.config.n_layer
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                shrink = math.sqrt(n_writes) if name.endswith("c_proj.weight") else 1.0
                std = self.config.initializer_range / shrink
                nn.init.normal_(parameter, std=std, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    if TYPE_CHECKING:  # nn.Module's own gives Any

        def __call__(self, idx: Tensor, cache: KVCache | None = None) -> Tensor: ...

    def forward(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """Scores of every next token: idx (B, T) int64 -> logits (B, T, V).

        With a cache, idx continues each of its rows and is added to it.
        """
        return self.head(self.hidden(idx, cache))

    def hidden(
        self, idx: Tensor, cache: KVCache | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """What the last layer knows at every token: idx (B, T) -> (B, T, C).

        With `documents` (B, T), the number of each token's document in its row, rising, every
        document is read as if it stood alone: its positions begin at 0, and its tokens look at
        nothing else. Raises InputError beyond block_size, or beyond the cache, and for what are no
        ids (on CUDA, ids that no embedding belongs to are torch's error).
        """
        _check_ids(idx, cache)
        n_tokens = idx.shape[1]
        if cache is None:
            limit = self.config.block_size
            if n_tokens > limit:
                raise InputError(f"{n_tokens} tokens were given, the model has {limit} positions")
            positions, mask = torch.arange(n_tokens, device=idx.device)[None], None
            if documents is not None:
                positions, mask = _apart(documents)
            layers: Sequence[LayerCache | None] = [None] * len(self.h)
        else:
            assert documents is None, "a cache holds one text a row"
            positions = cache.positions(n_tokens)  # (B, T)
            mask = cache.mask(positions)  # (B, 1, T, S)
            layers = cache.layers(positions)
        try:
            x = self.read(idx, positions, mask, layers)
        except IndexError:  # looked at only then: to ask a GPU would mean to wait for it
            if 0 <= int(idx.min()) <= int(idx.max()) < self.config.vocab_size:
                raise
            raise InputError(unknown_ids("idx", idx.flatten().tolist(), self.config)) from None
        if cache is not None:
            cache.advance(n_tokens)
        return x

    def read(
        self,
        idx: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        layers: Sequence[LayerCache | None],
    ) -> Tensor:
        """The network itself: idx (B, T) at positions (B or 1, T) -> (B, T, C), every layer with
        its part of the cache, if there is one.
        """
        x = self.drop(self.wte(idx) + self.wpe(positions))  # (B, T, C)
        for block, layer in zip(self.h, layers):
            x = block(x, mask, layer)
        return self.ln_f(x)

    def head(self, x: Tensor) -> Tensor:
        """x (..., C) -> logits (..., V); the matrix is the token embedding's own unless the config
        unties them.
        """
        tied = self.config.tie_word_embeddings
        return F.linear(x, self.wte.weight) if tied else self.lm_head(x)

    def make_cache(self, batch_size: int, capacity: int | None = None) -> KVCache:
        """An empty cache for `batch_size` rows of up to `capacity` tokens (at most, and by default,
        block_size).
        """
        config = self.config
        capacity = whole("capacity", capacity or config.block_size, least=1)
        return KVCache.empty(
            n_layer=config.n_layer,
            batch_size=whole("batch_size", batch_size, least=1),
            n_head=config.n_head,
            capacity=min(capacity, config.block_size),
            head_size=config.head_size,
            dtype=self.ln_f.weight.dtype,  # what activations have
            device=self.ln_f.weight.device,
        )

    def to(self, *args: Any, **kwargs: Any) -> GPT2:
        """`nn.Module.to`, which takes a dtype by its name, too."""
        named = {name: by_name(value) for name, value in kwargs.items()}
        return super().to(*map(by_name, args), **named)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GPT2:
        """What every move and cast comes to (to, half, cuda, ...).

        Raises InputError for one that would change a model that was laid out for decoding.
        """
        ways = {way for chain in ways_of(self).values() for way in chain} & FIXED_WAYS
        if ways:
            here, there = self.ln_f.weight, fn(self.ln_f.weight)
            if (here.device, here.dtype) != (there.device, there.dtype):
                raise InputError(
                    f"this model is laid out for decoding on {here.device} in {here.dtype} "
                    f"({', '.join(sorted(ways))}): load it with the device and dtype it is to have"
                )
        return super()._apply(fn, recurse)

    def set_dropout(self, p: float) -> None:
        """Drop this share of activations while training, wherever GPT-2 has dropout."""
        require("p", p, 0 <= p < 1, "from 0 to below 1")
        self.config = replace(self.config, embd_pdrop=p, attn_pdrop=p, resid_pdrop=p)
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = p
            elif isinstance(module, CausalSelfAttention):
                module.attn_pdrop = p

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        deferred: bool = False,
    ) -> GPT2:
        """Load a Hub id, a Hugging Face folder or a run folder, ready to use (in evaluation mode).

        Float32 on the CPU unless `dtype` and `device` say otherwise, whatever the file holds. LoRA
        adapters are folded into their base. Files that change meanwhile are read again: a model is
        of one moment. With `deferred`, float32 matrices of Linears on the CPU are read when they
        are asked for: at once, by `pack` and `quantize`, inside `files.at_one_moment`. Raises
        InputError for what is missing, left over, of the wrong shape or not supported: nothing is
        ever ignored silently.
        """
        where, number = as_device(device or "cpu"), as_dtype(dtype or torch.float32)
        deferred = deferred and number == torch.float32 and where.type == "cpu"
        return hugging_face.read_model(
            source, revision, lambda found: _read(found, where, number, deferred=deferred)
        )

    def save_pretrained(self, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
        """Write a Hugging Face model folder: config.json, model.safetensors and the tokenizer's
        files, if given.

        Raises InputError for a model whose weights were rounded or laid out for decoding.
        """
        with torch.device("meta"):
            names = {name for name, _ in GPT2(self.config).named_parameters()}
        if names != {name for name, _ in self.named_parameters()}:
            ways = {way for chain in ways_of(self).values() for way in chain[-1:]}
            raise InputError(
                f"this model was changed ({', '.join(sorted(ways))}): save the one it was made of, "
                "or fold its adapters first"
            )
        last = self.config.vocab_size - 1
        roles = {"bos_token_id": last, "eos_token_id": last}
        if tokenizer is not None:
            roles = {role: id for role, id in tokenizer.roles().items() if id <= last}
        hugging_face.save(self, {**self.config.to_hf(), **roles}, Path(folder))
        if tokenizer is not None:
            tokenizer.save(Path(folder), model_max_length=self.config.block_size)


def config_of(folder: Path) -> GPT2Config:
    """The shape of the model in a folder, or of the base of the adapters in it; no weights are
    needed.
    """
    folder = hugging_face.config_folder(folder)
    return GPT2Config.from_hf(hugging_face.read_config(folder), where=str(folder / "config.json"))


def skeleton(
    found: Path | ModelFolder, *, dtype: torch.dtype = torch.float32, own_head: bool = False
) -> tuple[GPT2, TensorFiles]:
    """The model of a Hugging Face folder on "meta", without values, and the files that hold them;
    adapters are folded in float32, or in `dtype` if that is wider.

    An output head in the files that differs from the token embedding makes an untied model,
    whatever config.json says; with `own_head`, an equal one does, too. Raises InputError for sizes
    that are not those of the files, before anything of such sizes is built, and for a path that
    holds adapters.
    """
    if isinstance(found, Path):
        found = hugging_face.ModelFolder.without_adapters(found)
    values, where = hugging_face.read_config(found.path), str(found.path / "config.json")
    sizes = hugging_face.read_config_fields(values, GPT2Config, where)
    files = found.open(dtype)
    hugging_face.check_sizes(sizes, files, where, values)
    config = GPT2Config.from_hf(values, where=where)
    if not config.tie_word_embeddings:
        hugging_face.check_head(files, where)
    elif own_head:
        files = files.with_own_head()
    if config.tie_word_embeddings and (own_head or hugging_face.has_own_head(files)):
        config = replace(config, tie_word_embeddings=False)
    with torch.device("meta"):
        return GPT2(config), files


class evaluation_mode:
    """Dropout is off inside `with evaluation_mode(model)`, and every module has the mode it had
    afterwards, also after an error. One such object may be entered again and again.
    """

    def __init__(self, model: nn.Module) -> None:
        # listed once: to go through the modules of the 124M model takes 0.1 ms
        self._modules, self._training = list(model.modules()), []

    def __enter__(self) -> None:
        self._training = [module for module in self._modules if module.training]
        for module in self._training:
            module.training = False

    def __exit__(self, *problem: object) -> None:
        for module in self._training:
            module.training = True


def unknown_ids(name: str, ids: Sequence[int], config: GPT2Config) -> str:
    """What is wrong with ids some of which have no embedding."""
    return (
        f"{name} holds ids from {min(ids)} to {max(ids)}, the model knows 0 to "
        f"{config.vocab_size - 1}: use the tokenizer that belongs to it"
    )


def _check_ids(idx: Tensor, cache: KVCache | None) -> None:
    if not isinstance(idx, Tensor) or idx.dtype not in (torch.int64, torch.int32):
        raise refuse("idx", idx, "an int64 tensor of ids (B, T)")
    if idx.dim() != 2:
        hint = ": idx[None] makes a row of it" if idx.dim() == 1 else ""
        shape = tuple(idx.shape)
        raise InputError(f"idx has the shape {shape}, allowed is (B, T), rows of ids{hint}")
    if cache is not None and len(idx) != len(cache.lengths):
        raise InputError(f"idx has {len(idx)} rows, the cache has {len(cache.lengths)}")


def _read(found: ModelFolder, device: torch.device, dtype: torch.dtype, *, deferred: bool) -> GPT2:
    deferred = deferred and not found.adapters
    model, files = skeleton(found, dtype=dtype, own_head=deferred)
    hugging_face.fill(model, files, device=device, dtype=dtype, deferred=deferred)
    return model.eval()


def _apart(documents: Tensor) -> tuple[Tensor, Tensor]:
    """documents (B, T), numbers that rise -> positions (B, T) of the tokens in their documents, and
    the mask (B, 1, T, T) of what they may look at.
    """
    index = torch.arange(documents.shape[1], device=documents.device)
    positions = index - torch.searchsorted(documents, documents)  # which finds the first of equals
    same = documents[:, :, None] == documents[:, None, :]  # (B, T, T)
    return positions, (same & (index <= index[:, None]))[:, None]


def _embedding(n_rows: int, width: int) -> nn.Embedding:
    # nn.Embedding(n, c) would first draw N(0, 1), and on "meta" import 800 modules (1.5 s) to do so
    return nn.Embedding.from_pretrained(torch.empty(n_rows, width), freeze=False)
