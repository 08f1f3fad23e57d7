"""Texts as decoding must write them: the stated rule, in the plainest way, and models to try it."""

import itertools

import torch

from hf_models import randomise
from minigpt2.model import GPT2, GPT2Config
from minigpt2.sampling import SamplingConfig, draw, probabilities, row_generator
from minigpt2.tokenizer import Tokenizer

WINDOW = 31
GREEDY = SamplingConfig(temperature=0)
SAMPLED = SamplingConfig(temperature=1.3, top_k=97, top_p=0.95, repetition_penalty=1.2)
BYTES = Tokenizer.gpt2(257)  # one token a byte, and end-of-text
EOT = BYTES.eot


def random_model(dtype=torch.float32, **values):
    shape = {"vocab_size": 257, "block_size": WINDOW, "n_embd": 34, "n_layer": 3, "n_head": 2}
    model = GPT2(GPT2Config(**{**shape, **values})).to(dtype).eval()
    randomise(model, std=0.4)
    return model.requires_grad_(False)


MODEL = random_model()


@torch.no_grad()
def scripted(*tokens, vocab_size=257):
    """A model that says tokens[p] after position p, whatever it reads."""
    n = len(tokens)
    model = GPT2(
        GPT2Config(
            vocab_size=vocab_size, block_size=n, n_embd=n + 1, n_layer=1, n_head=1,
            tie_word_embeddings=False,
        )
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        parameter.zero_()
    model.wpe.weight.fill_diagonal_(1)
    model.ln_f.weight.fill_(1)
    model.lm_head.weight[list(tokens), range(n)] = 1e4
    return model


def prompt_of(length, seed=0):
    generator = torch.Generator().manual_seed(1000 * length + seed)
    return torch.randint(257, (length,), generator=generator).tolist()


def likeliest(logits, text):
    return int(logits.argmax())


def drawn(sampling, seed, row):
    """A choice that draws as row `row` does under `seed`."""
    generator = row_generator(seed, row)

    def choose(logits, text):
        return int(draw(probabilities(logits[None], sampling, [text]), [generator]))

    return choose


def uncached(model, prompt, n_new, choose=likeliest):
    """The stated rule, in the plainest way: no cache, no batch, all of `read` again every time."""
    window = model.config.block_size
    text, read = list(prompt), prompt[-window:]
    for _ in range(n_new):
        text.append(choose(model(torch.tensor([read]))[0, -1], text))
        if len(read) == window:
            read = read[window - window // 2 :]
        read = [*read, text[-1]]
    return text[len(prompt) :]


def up_to(ids, stops):
    return list(itertools.takewhile(lambda token: token not in stops, ids))


def reads_of(model, monkeypatch):
    """The shapes (B, T) of everything the model reads from now on."""
    shapes, hidden = [], model.hidden

    def spy(idx, cache=None):
        shapes.append(tuple(idx.shape))
        return hidden(idx, cache)

    monkeypatch.setattr(model, "hidden", spy)
    return shapes
