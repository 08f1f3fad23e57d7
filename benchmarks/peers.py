"""Other programs that decode GPT-2, each as a function from a model folder to a way to decode it.

`written_for_...` turns a Hugging Face folder into the peer's own files. A peer that is not there
raises ModuleNotFoundError when it is asked for; one that cannot do on this machine what is wanted,
Unable.
"""

# No heavy import at the top: what a process imports counts for its start.
from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Rows = list[list[int]]
Run = Callable[[Rows, int], Rows]  # the ids of every row, and how many to add -> the added ids
# what is imported, by the name under which it is installed
PACKAGES = {
    "transformers": "transformers",
    "ctranslate2": "ctranslate2",
    "llama-cpp-python": "llama_cpp",
    "gguf": "gguf",
}
GGUF = {"float32": "F32", "float16": "F16", "int8": "Q8_0"}  # llama.cpp's names of precisions
ROOM = 256  # positions of a row, by which llama.cpp's cache grows


class Unable(Exception):
    """What a peer cannot do on this machine."""


def hugging_face(folder: str, device: str, precision: str) -> Run:
    """`generate` of transformers."""
    import torch
    from transformers import GPT2LMHeadModel

    model: Any = GPT2LMHeadModel.from_pretrained(folder, dtype=getattr(torch, precision))
    model.to(device).eval().generation_config.eos_token_id = None  # so that no row ends early

    def run(rows: Rows, new: int) -> Rows:
        idx = torch.tensor(rows, device=device)
        seen = torch.ones_like(idx)
        made = model.generate(idx, attention_mask=seen, max_new_tokens=new, do_sample=False)
        return made[:, idx.shape[1] :].tolist()

    return run


def ctranslate2(folder: str, device: str, precision: str) -> Run:
    """CTranslate2's generator, which takes tokens by name."""
    import ctranslate2 as peer  # pyright: ignore

    if precision not in peer.get_supported_compute_types(device):
        raise Unable(f"CTranslate2 has no {precision} on this {device}")
    threads = {"inter_threads": 1, "intra_threads": int(os.environ["OMP_NUM_THREADS"])}
    generator = peer.Generator(folder, device=device, compute_type=precision, **threads)
    names = json.loads((Path(folder) / "vocabulary.json").read_text("utf-8"))

    def run(rows: Rows, new: int) -> Rows:
        made = generator.generate_batch(
            [[names[id] for id in row] for row in rows],
            beam_size=1,
            sampling_topk=1,
            max_length=new,
            min_length=new,  # so that no row ends early
            include_prompt_in_result=False,  # reads the prompt at once
        )
        return [row.sequences_ids[0] for row in made]

    return run


def written_for_ctranslate2(folder: str, into: str, precision: str) -> str:
    """Write a model folder in CTranslate2's format."""
    from ctranslate2.converters import TransformersConverter  # pyright: ignore

    return TransformersConverter(folder).convert(into, quantization=precision)


def llama_cpp(path: str, device: str, precision: str) -> Run:
    """llama.cpp, by its C interface, as that in Python has one row only. The file says how precise
    it is.
    """
    import llama_cpp as peer  # pyright: ignore

    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)  # it calls warnings errors
    peer.llama_backend_init()
    options = peer.llama_model_default_params()
    options.n_gpu_layers = 0 if device == "cpu" else options.n_gpu_layers
    model = peer.llama_model_load_from_file(os.fsencode(path), options)
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {Path(path).name}")
    context: Any = None
    size = (0, 0)

    def run(rows: Rows, new: int) -> Rows:
        nonlocal context, size
        wanted = (len(rows), -(-(len(rows[0]) + new) // ROOM) * ROOM)
        if wanted != size:
            if context:
                peer.llama_free(context)
            context, size = llama_context(model, *wanted), wanted
        peer.llama_memory_clear(peer.llama_get_memory(context), False)
        last = llama_step(context, rows, 0)
        added = [[id] for id in last]
        for position in range(len(rows[0]), len(rows[0]) + new - 1):
            last = llama_step(context, [[id] for id in last], position)
            for row, id in zip(added, last):
                row.append(id)
        return added

    return run


def llama_context(model: Any, n_rows: int, n_positions: int) -> Any:
    """A cache for so many rows of so many tokens each, in llama.cpp's own precision."""
    import llama_cpp as peer  # pyright: ignore

    options = peer.llama_context_default_params()
    options.n_ctx, options.n_seq_max = n_rows * n_positions, n_rows
    options.n_batch = n_rows * n_positions
    options.n_threads = options.n_threads_batch = int(os.environ["OMP_NUM_THREADS"])
    context = peer.llama_init_from_model(model, options)
    if not context:
        raise MemoryError(f"llama.cpp makes no cache of {n_rows} x {n_positions} tokens")
    return context


def llama_step(context: Any, rows: Rows, position: int) -> list[int]:
    """Read more of every row, from a position of all on: the likeliest next ids."""
    import llama_cpp as peer  # pyright: ignore
    import numpy as np

    batch = peer.llama_batch_init(sum(map(len, rows)), 0, 1)
    try:
        lasts = []
        for row_number, row in enumerate(rows):
            for offset, id in enumerate(row):
                i = batch.n_tokens
                batch.token[i], batch.pos[i] = id, position + offset
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, row_number
                batch.logits[i] = offset == len(row) - 1
                batch.n_tokens += 1
            lasts.append(batch.n_tokens - 1)
        if problem := peer.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode gives {problem}")
    finally:
        peer.llama_batch_free(batch)
    vocab = peer.llama_model_get_vocab(peer.llama_get_model(context))
    shape = (peer.llama_vocab_n_tokens(vocab),)
    scores = (peer.llama_get_logits_ith(context, i) for i in lasts)
    return [int(np.ctypeslib.as_array(score, shape=shape).argmax()) for score in scores]


def written_for_llama_cpp(folder: str, into: str, precision: str) -> str:
    """Write a model folder as a GGUF file without a vocabulary. As llama.cpp's own converter does,
    it rounds the matrices, but not the table of positions.
    """
    import gguf  # pyright: ignore
    import torch

    from minigpt2.model import GPT2

    logging.getLogger("gguf").setLevel(logging.WARNING)
    model = GPT2.from_pretrained(folder, dtype=torch.float32)
    config, kind = model.config, gguf.GGMLQuantizationType[GGUF[precision]]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    writer = gguf.GGUFWriter(path := f"{into}.gguf", "gpt2")
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    for name, tensor in model.state_dict().items():
        rounded = tensor.dim() == 2 and name != "wpe.weight"
        own = kind if rounded else gguf.GGMLQuantizationType.F32
        array = gguf.quants.quantize(tensor.numpy(), own)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), array, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
