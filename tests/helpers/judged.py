"""A tiny model that judges rows of tasks, and what one forward pass says of them."""

import torch

from minigpt2.evaluation.tasks.costs import Judge
from minigpt2.model import GPT2, GPT2Config
from minigpt2.tokenizer import Tokenizer

TOKENIZER = Tokenizer.gpt2(300)
EOT = TOKENIZER.eot


def judge(block_size=12, **options):
    config = GPT2Config(
        vocab_size=300, block_size=block_size, n_embd=8, n_layer=2, n_head=2, embd_pdrop=0.0
    )
    model = GPT2(config, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        model.wte.weight.mul_(20)
    return Judge(model, TOKENIZER, **options)


def plain(model, ids, n_scored):
    """(nats, whether each scored token is the likeliest) by one forward pass."""
    logits = model.eval()(torch.tensor([ids[:-1]]))[0].log_softmax(-1)[-n_scored:]
    targets = torch.tensor(ids[-n_scored:])
    nats = -logits.gather(1, targets[:, None]).sum().item()
    return nats, (logits.argmax(1) == targets).tolist()
