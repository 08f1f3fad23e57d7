"""The figures that `minigpt2 verify` holds against what it computes, by outside programs.

    python tests/verify_figures.py --write    writes minigpt2/assets/verify anew

transformers is the oracle for the network, its gradients, filters and greedy texts, in float64,
torch for AdamW, tokenizers for token ids, peft for an adapter. A test holds what is committed
against what they say today.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS / "helpers")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tokenizers import ByteLevelBPETokenizer  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import GPT2LMHeadModel  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

import walk  # noqa: E402
from hf_models import next_token_loss, randomised, reference  # noqa: E402
from minigpt2.tokenizer import Tokenizer  # noqa: E402

VERIFY = TESTS.parent / "minigpt2" / "assets" / "verify"
SHAPE = {"vocab_size": 300, "n_positions": 32, "n_embd": 12, "n_layer": 12, "n_head": 3}
N_NEW, STEPS = 20, 5
PEAK, WARMUP, DECAY, CLIP = 0.01, 2, 0.1, 1.0  # of the trajectory

TEXTS = [
    "",
    " ",
    "The dog",
    "Hello, I am",
    "Hello!! I'm Andrej Karpathy. It's 2022. w00t :D 🤗",
    "I'll we've they're he'd she's can't 'tis o'clock DON'T I'LL",
    "it’s ‘quoted’ “text” … – —",
    "   three spaces before, and two after  ",
    "tab\there\t\tand\vthere",
    "one\ntwo\n\nthree\n\n\n four \n five\n ",
    "CRLF\r\nline\r\n\r\nends\r",
    " \u00a0\u2003\u3000wide blanks\u200b\u2028\u2029",
    "1234567890 3.14159 1,000,000 0x1F 12th",
    "x1y2z3 v2.0.1-rc1 ²³ ½ Ⅷ ٣٤٥ १२३",
    "snake_case camelCase SCREAMING kebab-case",
    "    def f(x):\n        return x ** 2  # a comment\n",
    '{"key": [1, 2.5e-3, null], "nested": {"a": "b"}}',
    "<|endoftext|>",
    "a<|endoftext|>b <|endoftext|",
    "https://example.org/a/b?c=d&e=%20#f",
    "!!!???...,,,;;;:::---___***///\\\\\\",
    "()[]{}<>«»„“‚‘",
    "naïve café façade Ångström",
    "nai\u0308ve cafe\u0301 a\u0304\u0323",
    "Größe Straße ÄÖÜ ß ẞ",
    "Привет, мир! Ёлка.",
    "Γειά σου Κόσμε",
    "שלום עולם",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "你好,世界。今天天气很好",
    "こんにちは世界 カタカナ ﾊﾝｶｸ",
    "안녕하세요 세계",
    "👩‍👩‍👧‍👦 👍🏽 🇳🇱 ❤️",
    "\x00\x01\x1b[31m\x7f\x80\x9f",
    "\ufeffmark \ufffd \ufffe \ue000 \U0010ffff",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    " SolidGoldMagikarp petertodd rawdownload",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ﬁ ﬂ Ⓐ ㎏",
]

FILTERS: list[dict[str, float]] = [
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 3},
    {"top_p": 0.3},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.5},
    {"no_repeat_ngram": 2},
    {"no_repeat_ngram": 1},
    {"temperature": 2.0, "top_k": 6, "top_p": 0.8},
    {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3},
]
SCORES = [
    [2.0, 1.0, 0.5, -1.0, -3.0, 1.5, 1.4, 0.0, -0.2, 0.9, 0.3, -2.0],
    [-0.1, 0.4, 0.2, 0.3, 2.5, -1.1, 0.1, 0.6, 1.9, -0.7, 1.2, 0.05],
]
READ = [[0, 4, 5, 0, 9, 5], [8, 4, 8, 10, 4, 8]]  # what each row has been told


def write_model(folder: Path) -> None:
    """A tiny model as transformers writes it, far from a fresh one."""
    randomised(std=0.4, seed=11, **SHAPE).save_pretrained(folder)


def write_peft(folder: Path) -> None:
    """An adapter as peft writes it, for the model that the ways to compute are compared on."""
    with tempfile.TemporaryDirectory() as place:
        base = walk.write_folder(Path(place) / "base")
        walk.write_pefts_adapter(Path(place) / "peft", base)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(Path(place) / "peft" / name, folder)
    config = folder / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "base_model_name_or_path": "base"}, indent=1) + "\n")


def token_ids() -> list[list[Any]]:
    """[text, ids] of every text, by tokenizers."""
    assert len(TEXTS) == len({*TEXTS}) == 40
    with tempfile.TemporaryDirectory() as folder:
        Tokenizer.gpt2().save(Path(folder))
        files = (str(Path(folder) / "vocab.json"), str(Path(folder) / "merges.txt"))
        theirs = ByteLevelBPETokenizer(*files)
        return [[text, theirs.encode(text).ids] for text in TEXTS]


def logits(folder: Path) -> dict[str, Tensor]:
    """Two rows of ids, and their scores."""
    idx = walk.token_ids(SHAPE["vocab_size"], 2, 13)
    with torch.no_grad():
        return {"idx": idx, "logits": reference(folder)(idx).logits}


def batches() -> list[list[list[int]]]:
    """Of each step the rows (4, 17): 64 targets, by which a float32 can divide exactly."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(SHAPE["vocab_size"], (STEPS, 4, 17), generator=generator).tolist()


def gradients(folder: Path) -> dict[str, Any]:
    """The loss of the first batch and its gradients."""
    model, idx = reference(folder).eval(), torch.tensor(batches()[0])
    loss = next_token_loss(model(idx).logits, idx)
    loss.backward()
    return {
        "loss": loss.item(),
        "parameters": sketch(model, lambda p: p.grad),
    }


def trajectory(folder: Path) -> dict[str, Any]:
    """Five steps of AdamW by hand: decay of matrices only, clipping, a rise and half a cosine."""
    model = reference(folder).eval()  # without dropout
    parameters = [*model.parameters()]
    groups = [
        {"params": [p for p in parameters if p.dim() == 2], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    losses, norms = [], []
    for step, rows in enumerate(batches()):
        idx = torch.tensor(rows)
        loss = next_token_loss(model(idx).logits, idx)
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in parameters))
        for p in parameters:
            p.grad *= min(1.0, CLIP / (norm + 1e-6))
        rising = PEAK * (step + 1) / WARMUP
        done = (step - WARMUP) / (STEPS - WARMUP)
        falling = PEAK * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rising if step < WARMUP else falling
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm)
    settings = {"peak": PEAK, "warmup_steps": WARMUP, "weight_decay": DECAY, "grad_clip": CLIP}
    return {
        "settings": settings,
        "losses": losses,
        "norms": norms,
        "parameters": sketch(model, lambda p: p.detach()),
    }


def sketch(model: GPT2LMHeadModel, of: Any) -> dict[str, list[float]]:
    """Of each parameter, as GPT-2's own program names and we lay it, the norm of something that it
    has, and its product with a wave.
    """
    found = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = of(parameter)
            if isinstance(module, Conv1D) and value.dim() == 2:
                value = value.T
            flat = value.reshape(-1)
            wave = torch.cos(0.7 * torch.arange(1, len(flat) + 1, dtype=torch.float64))
            full = f"{prefix}.{name}".removeprefix("transformer.")
            found[full] = [math.sqrt(float((flat**2).sum())), float((flat * wave).sum())]
    del found["lm_head.weight"]  # the embedding once more
    return found


def filtered(settings: dict[str, float]) -> list[list[float]]:
    """What transformers' processors, in the order of its generate, leave of SCORES."""
    ids, scores = torch.tensor(READ), torch.tensor(SCORES, dtype=torch.float64)
    kinds = {
        "repetition_penalty": transformers.RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram": transformers.NoRepeatNGramLogitsProcessor,
        "temperature": transformers.TemperatureLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    for name, kind in kinds.items():
        if name in settings:
            scores = kind(settings[name])(ids, scores)
    return F.softmax(scores, dim=-1).tolist()


def greedy(folder: Path) -> dict[str, Any]:
    """How prompts of different length go on, each alone; no two scores are so near that rounding
    decides.
    """
    model = reference(folder).eval()
    model.generation_config.eos_token_id = None
    prompts = [walk.token_ids(SHAPE["vocab_size"], 1, n)[0].tolist() for n in (5, 1, 11)]
    ids = []
    for prompt in prompts:
        idx = torch.tensor([prompt])
        seen = torch.ones_like(idx)
        made = model.generate(idx, attention_mask=seen, max_new_tokens=N_NEW, do_sample=False)
        with torch.no_grad():
            two = model(made).logits[0, len(prompt) - 1 : -1].topk(2).values
        assert float((two[:, 0] - two[:, 1]).min()) > 1e-3, "another seed says more"
        ids.append(made[0, len(prompt) :].tolist())
    assert len({id for row in ids for id in row}) > 10, "another seed says more"
    return {"prompts": prompts, "ids": ids}


def figures(folder: Path) -> dict[str, Any]:
    """All that figures.json holds, of the model in a folder."""
    cases = [[settings, filtered(settings)] for settings in FILTERS]
    return {
        "texts": token_ids(),
        "batches": batches(),
        "gradients": gradients(folder),
        "trajectory": trajectory(folder),
        "filters": {"logits": SCORES, "texts": READ, "cases": cases},
        "greedy": greedy(folder),
    }


def main() -> None:
    """With --write, make everything anew."""
    parser = argparse.ArgumentParser(description="The figures of minigpt2 verify.")
    parser.add_argument("--write", action="store_true", help="write minigpt2/assets/verify")
    if not parser.parse_args().write:
        parser.error("nothing is done without --write")
    write_model(VERIFY / "model")
    write_peft(VERIFY / "peft")
    save_file(logits(VERIFY / "model"), VERIFY / "logits.safetensors")
    text = json.dumps(figures(VERIFY / "model"), ensure_ascii=True, separators=(",", ":"))
    (VERIFY / "figures.json").write_text(text + "\n", "ascii")


if __name__ == "__main__":
    main()
