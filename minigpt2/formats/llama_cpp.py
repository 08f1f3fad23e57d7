"""What llama.cpp's converter, convert_hf_to_gguf.py, cannot take of a model folder.

It reads sizes from config.json and the network's form from nowhere: it has GPT-2's own. It knows a
vocabulary by the ids of one text, and of GPT-2's kind it knows GPT-2's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..arguments import shown

ARCHITECTURES = ["GPT2LMHeadModel"]
GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "gelu_python_tanh")


def refusals(
    config: Mapping[str, Any], *, n_rows: int, n_ids: int | None, gpt2s_vocabulary: bool
) -> list[str]:
    """Why the converter does not take a folder with this config.json, or takes it for another
    model; `n_ids` is the tokenizer's, None where there is none.
    """
    width, inner = config.get("n_embd"), config.get("n_inner")
    found = {
        "it has no tokenizer": n_ids is None,
        "its vocabulary is not GPT-2's": n_ids is not None and not gpt2s_vocabulary,
        f"its tokenizer has {n_ids} ids, the model {n_rows} rows": (n_ids or 0) > n_rows,
        f"architectures is {shown(config.get('architectures'))}": (
            config.get("architectures", ARCHITECTURES) != ARCHITECTURES
        ),
        f"n_inner is {inner}, not 4 n_embd": inner is not None and inner != 4 * (width or 0),
        f"activation_function is {shown(config.get('activation_function'))}": (
            config.get("activation_function", GELU[0]) not in GELU
        ),
        "scale_attn_weights is false": config.get("scale_attn_weights") is False,
        "scale_attn_by_inverse_layer_idx is true": (
            config.get("scale_attn_by_inverse_layer_idx") is True
        ),
    }
    return [reason for reason, so in found.items() if so]
