"""The real GPT-2 124M gives the figures that others have published for it.

The same checks run on a small made model from a Hub on the loopback interface, with transformers'
figures for it, so that they are known to work when somebody asks the real Hub.
"""

import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from huggingface_hub import close_session, constants
from transformers import AutoTokenizer

from hf_models import randomised, reference
from hub_fixtures import use_endpoint
from hub_server import HubServer, network
from minigpt2 import GPT2, SamplingConfig, Tokenizer, complete, generate
from minigpt2.evaluation.scorer import Scorer

GREEDY = SamplingConfig(temperature=0)
RAGGED = ("Hello, my dog is a little", "Today, I")
TURING = "Alan Turing theorized that computers would one day become"


@dataclass(frozen=True)
class Figures:
    """What a model is known to give, from elsewhere."""

    source: str
    n_parameters: int
    first: list[int]  # ids to go on from
    greedy: list[int]  # and greedily 18 more
    ragged: tuple[str, ...]  # how the two texts of RAGGED go on, greedily, prompts included
    loss: float  # of "Hello world!" after end-of-text
    forty: str  # greedy tokens after TURING


PUBLISHED = Figures(
    source="gpt2",
    n_parameters=124_439_808,
    # transformers, tests/models/gpt2/test_modeling_gpt2.py: "The dog", 20 tokens in all
    first=[464, 3290],
    greedy=[
        *(464, 3290, 373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688),
        *(27262, 13, 198, 198, 464, 3290),
    ],
    ragged=(  # the same file
        "Hello, my dog is a little bit of a mess. I'm not sure if he's going",
        "Today, I'm going to be doing a lot of research on this. I",
    ),
    loss=5.331855773925781,  # TransformerLens, tests/acceptance
    forty=(  # picoGPT's README
        " the most powerful machines on the planet.\n\nThe computer is a machine that can perform "
        "complex calculations, and it can perform these calculations in a way that is very similar "
        "to the human brain."
    ),
)


def made_figures(folder: Path) -> Figures:
    """What transformers says of a folder, one text at a time."""
    theirs = reference(folder, torch.float32).eval()
    theirs.generation_config.eos_token_id = None  # so that no text ends early
    words = AutoTokenizer.from_pretrained(folder)

    def go_on(ids: list[int], n_new: int) -> list[int]:
        idx = torch.tensor([ids])
        seen = torch.ones_like(idx)
        made = theirs.generate(idx, attention_mask=seen, max_new_tokens=n_new, do_sample=False)
        new = made[0, len(ids) :].tolist()
        assert words.eos_token_id not in new and len(set(new)) > 4, "another seed says more"
        return new

    def text_after(prompt: str, n_new: int) -> str:
        return words.decode(go_on(words.encode(prompt), n_new), clean_up_tokenization_spaces=False)

    first = words.encode("The dog")
    ids = torch.tensor([[words.eos_token_id, *words.encode("Hello world!")]])
    with torch.no_grad():
        loss = theirs(ids, labels=ids).loss.item()
    return Figures(
        source="someone/made",
        n_parameters=sum(p.numel() for p in theirs.parameters()),
        first=first,
        greedy=[*first, *go_on(first, 18)],
        ragged=tuple(prompt + text_after(prompt, 25) for prompt in RAGGED),
        loss=loss,
        forty=text_after(TURING, 40),
    )


@pytest.fixture(scope="module", params=["made", pytest.param("published", marks=network)])
def figures(request, tmp_path_factory):
    """Published figures, or those of a made model; the client asks the Hub that has the model."""
    if request.param == "published":
        yield PUBLISHED
        return
    folder = tmp_path_factory.mktemp("made")
    randomised(vocab_size=300, n_positions=128, n_layer=3, seed=5).save_pretrained(folder)
    Tokenizer.gpt2(300).save(folder)
    with pytest.MonkeyPatch.context() as patch, HubServer({"someone/made": folder}) as server:
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        use_endpoint(patch, server.url)
        yield made_figures(folder)
        assert server.count("GET", "model.safetensors") == 1
    close_session()


@pytest.fixture(scope="module")
def model(figures):
    return GPT2.from_pretrained(figures.source)


@pytest.fixture(scope="module")
def tokenizer(figures):
    return Tokenizer.from_pretrained(figures.source)


def test_it_has_the_known_number_of_parameters(figures, model):
    assert sum(p.numel() for p in model.parameters()) == figures.n_parameters


def test_greedy_ids_are_those_of_transformers(figures, model, tokenizer):
    assert tokenizer.encode("The dog") == figures.first
    (new,) = generate(model, [figures.first], max_new_tokens=18, sampling=GREEDY)
    assert [*figures.first, *new] == figures.greedy


def test_a_ragged_batch_writes_the_sentences_of_transformers(figures, model, tokenizer):
    done = complete(model, tokenizer, RAGGED, max_new_tokens=25, sampling=GREEDY)
    assert len(done) == len(figures.ragged) == len(RAGGED)
    for prompt, completion, text in zip(RAGGED, done, figures.ragged):
        assert (prompt + completion.text).startswith(text)


def test_the_loss_of_hello_world_is_known(figures, model, tokenizer):
    ids = torch.tensor([[tokenizer.eot, *tokenizer.encode("Hello world!")]])
    with torch.no_grad():
        loss = Scorer(model)(ids[:, :-1], ids[:, 1:]) / (ids.shape[1] - 1)
    assert loss.item() == pytest.approx(figures.loss, abs=4e-5)  # TransformerLens' tolerance


def test_forty_greedy_tokens_are_known(figures, model, tokenizer):
    (done,) = complete(model, tokenizer, [TURING], max_new_tokens=40, sampling=GREEDY)
    assert done.text.startswith(figures.forty)


LIST = """
import sys
import pytest

class Listed:
    def pytest_collection_finish(self, session):
        for item in session.items:
            real = item.get_closest_marker("network") is not None
            print("item", real, item.nodeid.partition("[")[0])

sys.exit(pytest.main(["--collect-only", "-qq", *sys.argv[1:]], plugins=[Listed()]))
"""


def test_whatever_asks_the_real_hub_runs_on_the_loopback_interface_too():
    """A test that nobody runs rots."""
    tests = Path(__file__).parent
    paths = [str(p) for p in sorted(tests.rglob("test_*.py")) if "network" in p.read_text()]
    done = subprocess.run(
        [sys.executable, "-c", LIST, *paths],
        cwd=tests.parent,
        env={**os.environ, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    kinds = defaultdict(set)
    for line in done.stdout.splitlines():
        if line.startswith("item "):
            _, real, name = line.split(" ", 2)
            kinds[name].add(real)
    assert done.returncode == 0, done.stdout + done.stderr
    real = {name for name, found in kinds.items() if "True" in found}
    assert len(real) >= 6
    assert not [name for name in real if kinds[name] != {"True", "False"}]
