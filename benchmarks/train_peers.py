"""Other ways to train GPT-2, each as a function that trains on and on and tells of every step.

They are given the same weights, batches, AdamW and clipping, and what else is theirs is theirs:
how the model is written, how the loss is made, which AdamW is taken.
"""

# No heavy import at the top: what a process imports counts for its memory.
from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Told = Callable[[float], None]  # is called with the loss of every step


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and how."""

    folder: str  # of the model that all begin with, in float32
    n_rows: int
    n_tokens: int  # of a row
    dropout: float
    device: str
    dtype: str  # float32, or bfloat16 for autocast
    lora_rank: int = 0  # of adapters, which alone are trained; 0 trains all
    learning_rate: float = 3e-4
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """idx, targets (B, T), one batch after the other, the same for all: what follows a token is
        one of few, so that there is something to learn.
        """
        import torch

        from minigpt2.formats.hugging_face import read_config

        vocab_size = read_config(Path(self.folder))["vocab_size"]
        random = torch.Generator().manual_seed(3)
        shape = self.n_rows, self.n_tokens + 1
        while True:
            steps = torch.randint(1, 4, shape, generator=random).cumsum(1)
            first = torch.randint(vocab_size, (self.n_rows, 1), generator=random)
            ids = (first + steps) % vocab_size
            yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def nanogpt(task: Task, told: Told) -> None:
    """nanoGPT's step: all logits at once, cross_entropy over them, AdamW fused on CUDA only."""
    import torch
    from torch.nn import functional as F
    from torch.nn.utils import clip_grad_norm_

    model = nanogpt_model(task).train()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": task.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    fused = {"fused": True} if task.device == "cuda" else {}
    optimizer = torch.optim.AdamW(groups, lr=task.learning_rate, betas=task.betas, **fused)
    dtype = getattr(torch, task.dtype)
    for idx, targets in task.batches():
        idx, targets = idx.to(task.device), targets.to(task.device)
        with torch.autocast(task.device, dtype, enabled=dtype != torch.float32):
            logits = model(idx)
            loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))
        loss.backward()
        clip_grad_norm_(model.parameters(), task.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        told(loss.item())


def nanogpt_model(task: Task) -> torch.nn.Module:
    """GPT-2 as nanoGPT writes it, with the weights of the task."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    from minigpt2.model import GPT2

    source = GPT2.from_pretrained(task.folder)
    config, p = source.config, task.dropout

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
            self.c_proj = nn.Linear(config.n_embd, config.n_embd)
            self.dropout = nn.Dropout(p)

        def forward(self, x: Tensor) -> Tensor:
            shape = *x.shape[:2], config.n_head, config.head_size
            parts = self.c_attn(x).split(config.n_embd, dim=2)
            q, k, v = (part.view(shape).transpose(1, 2) for part in parts)
            rate = p if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
            return self.dropout(self.c_proj(y.transpose(1, 2).contiguous().view(x.shape)))

    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
            self.gelu = nn.GELU(approximate="tanh")  # as GPT-2's, where nanoGPT has erf
            self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
            self.dropout = nn.Dropout(p)

        def forward(self, x: Tensor) -> Tensor:
            return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln_1, self.attn = nn.LayerNorm(config.n_embd), Attention()
            self.ln_2, self.mlp = nn.LayerNorm(config.n_embd), MLP()

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attn(self.ln_1(x))
            return x + self.mlp(self.ln_2(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte = nn.Embedding(config.vocab_size, config.n_embd)
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
            self.drop = nn.Dropout(p)
            self.h = nn.ModuleList(Block() for _ in range(config.n_layer))
            self.ln_f = nn.LayerNorm(config.n_embd)

        def forward(self, idx: Tensor) -> Tensor:
            positions = torch.arange(idx.shape[1], device=idx.device)
            x = self.drop(self.wte(idx) + self.wpe(positions))
            for block in self.h:
                x = block(x)
            return F.linear(self.ln_f(x), self.wte.weight)

    model = Model()
    model.load_state_dict(source.state_dict())
    return model.to(task.device)


def hf_trainer(task: Task, told: Told) -> None:
    """transformers' Trainer on its own GPT2LMHeadModel, with what is the same for all."""
    import torch
    from torch.utils.data import IterableDataset
    from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    class Rows(IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            for idx, targets in task.batches():
                for row, following in zip(idx, targets):
                    # targets are already those of the next tokens
                    yield {"input_ids": row, "labels": following, "shift_labels": following}

    losses: list[float] = []

    class Timed(Trainer):
        def training_step(self, *given: Any, **options: Any) -> Tensor:
            loss = super().training_step(*given, **options)
            losses.append(loss.item())
            return loss

    class Tells(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            told(losses[-1])

    rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), task.dropout)
    model = GPT2LMHeadModel.from_pretrained(task.folder, dtype=torch.float32, **rates)
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out,
            per_device_train_batch_size=task.n_rows,
            max_steps=10**6,
            learning_rate=task.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=task.weight_decay,
            adam_beta1=task.betas[0],
            adam_beta2=task.betas[1],
            max_grad_norm=task.grad_clip,
            use_cpu=task.device == "cpu",
            bf16=task.dtype == "bfloat16",
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        dataset = Rows()
        Timed(model, arguments, train_dataset=dataset, callbacks=[Tells()]).train()
