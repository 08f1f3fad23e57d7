"""Models of Hugging Face's transformers as folders, and how far ours is from them when both read
the same folder.

Every parameter is random, see `randomise`. Twelve layers, because h.10 sorts
before h.2.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from minigpt2.cli.proofs.walk import randomise, token_ids
from minigpt2.model import GPT2

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TINY = {"vocab_size": 257, "n_positions": 64, "n_embd": 64, "n_layer": 12, "n_head": 4}
GPT2_124M = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "std": 0.02,
}
TOLERANCE = 1e-10  # float64: rounding stays below 1e-12, the smallest known mistake makes 1e-3


def randomised(*, std: float = 0.2, seed: int = 0, **values: object) -> GPT2LMHeadModel:
    """A transformers model of the TINY shape, with `values` changed in its config."""
    values = {**TINY, **values}
    end = values["vocab_size"] - 1
    config = transformers.GPT2Config(**values, bos_token_id=end, eos_token_id=end)
    model = GPT2LMHeadModel(config)
    randomise(model, std=std, seed=seed)
    return model


def reference(folder: Path, dtype: torch.dtype = torch.float64, **options) -> GPT2LMHeadModel:
    """What transformers makes of a folder; it must have found every tensor and no other."""
    model, report = GPT2LMHeadModel.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, **options
    )
    assert not any(report.values()), report
    return model


@torch.no_grad()
def logit_difference(
    folder: Path, dtype: torch.dtype = torch.float64, *, length: int = 64, **options
) -> float:
    """Largest difference between our logits and theirs, at all positions of two rows."""
    theirs = reference(folder, dtype, **options)
    ours = GPT2.from_pretrained(folder, dtype=dtype)
    idx = token_ids(theirs.config.vocab_size, 2, length)
    return float((ours(idx) - theirs(idx).logits).abs().max())


def gradient_difference(folder: Path) -> float:
    """Largest difference between our float64 loss and gradients and theirs."""
    ours, theirs = GPT2.from_pretrained(folder, dtype=torch.float64), reference(folder)
    idx = token_ids(theirs.config.vocab_size, 2, 64)
    losses = next_token_loss(ours(idx), idx), next_token_loss(theirs(idx).logits, idx)
    for loss in losses:
        loss.backward()
    gradients = difference(ours, theirs, lambda parameter: parameter.grad)
    return max(gradients, abs(losses[0].item() - losses[1].item()))


def step_difference(folder: Path) -> float:
    """Largest difference between our float64 parameters and theirs after one step of AdamW."""
    models = GPT2.from_pretrained(folder, dtype=torch.float64), reference(folder)
    idx = token_ids(models[1].config.vocab_size, 2, 64)
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        output = model(idx)
        next_token_loss(output if isinstance(output, Tensor) else output.logits, idx).backward()
        optimizer.step()
    return difference(*models, lambda parameter: parameter.detach())


def next_token_loss(logits: Tensor, idx: Tensor) -> Tensor:
    """Cross-entropy in the dtype of the logits; transformers' own loss would round to float32."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten())


def difference(ours: GPT2, theirs: GPT2LMHeadModel, of: Callable[[Tensor], Tensor]) -> float:
    """Largest difference of something the parameters have; the two sets of names must be equal."""
    expected = {}
    for prefix, module in theirs.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = of(parameter)
            # Conv1D keeps its matrices (in, out)
            transposed = isinstance(module, Conv1D) and value.dim() == 2
            full = f"{prefix}.{name}".removeprefix("transformer.")
            expected[full] = value.T if transposed else value
    if theirs.lm_head.weight is theirs.transformer.wte.weight:
        del expected["lm_head.weight"]
    found = {name: of(parameter) for name, parameter in ours.named_parameters()}
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in found)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder's model.safetensors without the prefix that transformers writes."""
    stored = load_file(folder / "model.safetensors")
    return {name.removeprefix("transformer."): value for name, value in stored.items()}


def copy_of(folder: Path, dest: Path, tensors: dict[str, Tensor] | None = None, **values) -> Path:
    """A model folder with other `tensors`, or none, and with `values` changed in its config."""
    dest.mkdir()
    config = json.loads((folder / "config.json").read_text())
    (dest / "config.json").write_text(json.dumps({**config, **values}))
    shutil.copy(folder / "generation_config.json", dest)
    if tensors is not None:
        save_file(tensors, dest / "model.safetensors", metadata={"format": "pt"})
    return dest
