"""The committed figures are what outside programs say today, and small."""

import numbers

import pytest
import torch
import verify_figures
from safetensors.torch import load_file
from tiktoken import Encoding

from minigpt2.evaluation.figures import FOLDER, figures, same_sketch, sketch
from minigpt2.formats.vocabulary import gpt2_tokens
from minigpt2.tokenizer import PIECES


def close(found, expected):
    """Whether two values of JSON are equal, numbers up to rounding in float64."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[k], expected[k]) for k in found)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(close, found, expected))
    if isinstance(expected, numbers.Real) and not isinstance(expected, int):
        return abs(found - expected) <= 1e-10 * max(1, abs(expected))
    return found == expected


@pytest.mark.parametrize(
    "name", ["texts", "batches", "gradients", "trajectory", "filters", "greedy"]
)
def test_committed_figures_are_what_the_oracles_say(name, oracles):
    assert oracles.keys() == figures().keys()
    assert close(figures()[name], oracles[name])


@pytest.fixture(scope="module")
def oracles():
    return verify_figures.figures(FOLDER / "model")


def test_committed_logits_are_what_transformers_says():
    found, expected = (
        load_file(FOLDER / "logits.safetensors"),
        verify_figures.logits(FOLDER / "model"),
    )
    assert torch.equal(found["idx"], expected["idx"]) and found["logits"].dtype == torch.float64
    assert (found["logits"] - expected["logits"]).abs().max() < 1e-10


def test_committed_token_ids_are_tiktokens_too():
    ranks = {token: rank for rank, token in enumerate(gpt2_tokens())}
    theirs = Encoding("gpt2", pat_str=PIECES, mergeable_ranks=ranks, special_tokens={})
    known = dict(figures()["texts"])
    assert len(known) == 40
    for text, ids in known.items():
        assert theirs.encode_ordinary(text) == ids
    andrej = known["Hello!! I'm Andrej Karpathy. It's 2022. w00t :D 🤗"]  # of minGPT's bpe.py
    assert andrej[:10] == [15496, 3228, 314, 1101, 10948, 73, 509, 5117, 10036, 13]
    assert known["The dog"] == [464, 3290] and known["Hello, I am"] == [15496, 11, 314, 716]


def test_what_is_committed_is_small():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 300_000 and len(files) == 8


def test_a_sketch_shows_other_values_and_another_order():
    x = {"w": torch.arange(12.0).reshape(3, 4)}
    known = sketch(x)
    assert same_sketch(sketch(x), known).status == "PASS"
    for other in (
        {"w": x["w"].T.contiguous()},
        {"w": x["w"] + 1e-6},
        {"w": x["w"] * float("nan")},
        {"v": x["w"]},
        {},
    ):
        assert same_sketch(sketch(other), known).status == "FAIL"
