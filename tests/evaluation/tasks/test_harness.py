"""WikiText, LAMBADA and HellaSwag score what lm-evaluation-harness says of the same rows."""

import json
import logging
import math
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minigpt2.evaluation.tasks.language_modelling import detokenised
from minigpt2.evaluation.tasks.table import read_items, run_task, score_items
from minigpt2.model import GPT2
from minigpt2.tokenizer import Tokenizer
from text_files import quick

ROOT = Path(__file__).parents[3]
DATA = ROOT / "data" / "tasks"
BLOCK_SIZE = 90  # most items fit, some do not
SPLITS = {"training_split", "validation_split", "test_split"}
FRAGMENTS = [
    *(" @-@ ", " @,@ ", " @.@ ", " , ", " . ", " ; ", " : ", " ! ", " ? ", " 's", "s '", " ° "),
    *("( ", " )", "[ ", " ]", "{ ", " }", ' " ', '"', "'", " ' ", " = ", "= = ", " = = = = "),
    *(" \n", "\n ", " N ", "a", "Bs", "7", " ", "é"),
]


@pytest.fixture(scope="module")
def harness():
    """lm-evaluation-harness, which takes long to import and warns of much."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets
        import lm_eval
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks._yaml_loader import load_yaml

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        folder = Path(lm_eval.__file__).parent / "tasks"

        def score(model, tokenizer, name, rows):
            """The harness' own task on these rows: its figures, and what each item cost."""
            config = load_yaml(folder / name)
            split = config.get("test_split") or config["validation_split"]
            config |= {key: split if config.get(key) == split else None for key in SPLITS}
            config |= {"dataset_path": "rows", "dataset_name": None}
            rows = {split: datasets.Dataset.from_list(rows)}
            task = ConfigurableTask(config={**config, "custom_dataset": lambda **_: rows})
            lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu")
            given = {"tasks": {"it": task}, "groups": {}, "group_map": {}}
            found = lm_eval.evaluate(lm=lm, task_dict=given, bootstrap_iters=10)
            figures = {key.split(",")[0]: value for key, value in found["results"]["it"].items()}
            return SimpleNamespace(**figures)

        def run(*args):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return score(*args)

        run.folder, run.load = folder, load_yaml
        yield run


@pytest.fixture(scope="module", params=["float64", "float32"])
def judges(request, tmp_path_factory):
    """transformers' model and tokenizer, and ours from the same folder, which like the word "the":
    a random model guesses nothing right.
    """
    import transformers

    from hf_models import randomised

    folder = tmp_path_factory.mktemp("model")
    theirs = randomised(vocab_size=400, n_positions=BLOCK_SIZE, n_layer=3, std=0.3)
    tokenizer = Tokenizer.gpt2(400)
    (the,) = tokenizer.encode(" the")
    with torch.no_grad():
        theirs.transformer.ln_f.bias += 1.3 * theirs.transformer.wte.weight[the]
    theirs.save_pretrained(folder)
    tokenizer.save(folder)
    dtype = getattr(torch, request.param)
    return SimpleNamespace(
        theirs=(theirs.to(dtype).eval(), transformers.AutoTokenizer.from_pretrained(folder)),
        ours=(GPT2.from_pretrained(folder, dtype=dtype), tokenizer),
        tolerance=1e-9 if dtype == torch.float64 else 1e-4,
    )


def rows_of(name):
    return [json.loads(line) for line in (DATA / name).read_text("utf-8").splitlines()]


def close(judges, ours, theirs):
    return ours == pytest.approx(theirs, rel=judges.tolerance)


def lambada_rows():
    """The miniature's, and some of which the model may guess the last word."""
    rows = rows_of("lambada_openai.jsonl")
    starts = [row["text"][:length] for row in rows for length in (20, 61, 173)]
    return rows + [{"text": f"{start.rpartition(' ')[0]} the"} for start in starts]


@pytest.mark.parametrize("variant", ["openai", "standard"])
def test_lambada_is_the_harness_own(harness, judges, variant):
    rows = lambada_rows()
    if variant == "standard":
        lines = (DATA / "lambada_standard.txt").read_text("utf-8").splitlines()
        rows = [*({"text": line} for line in lines), *rows[12:]]
    found = run_task(*judges.ours, f"lambada_{variant}", rows)
    expected = harness(*judges.theirs, f"lambada/lambada_{variant}.yaml", rows)
    assert 0 < expected.acc < 1
    assert close(judges, found["accuracy"].value, expected.acc)
    assert close(judges, found["accuracy"].error, expected.acc_stderr)
    assert close(judges, math.log(found["perplexity"].value), math.log(expected.perplexity))
    assert found["last_token_accuracy"].value >= found["accuracy"].value


def test_hellaswag_is_the_harness_own(harness, judges):
    rows = rows_of("hellaswag.jsonl")
    endings = [ending for row in rows for ending in row["endings"]]
    mixed = [
        {**row, "label": str((n + turn) % 4), "endings": endings[n * turn :: 11][:4]}
        for turn in (1, 2, 3)
        for n, row in enumerate(rows[:8])
    ]
    rows = [*({**row, "label": str(row["label"])} for row in rows), *mixed]
    rows = [row for row in rows if len(row["endings"]) == 4]
    found = run_task(*judges.ours, "hellaswag", rows)
    expected = harness(*judges.theirs, "hellaswag/hellaswag.yaml", rows)
    assert 0 < expected.acc < 1 and 0 < expected.acc_norm < 1
    assert close(judges, found["accuracy"].value, expected.acc)
    assert close(judges, found["accuracy"].error, expected.acc_stderr)
    assert close(judges, found["normalized_accuracy"].value, expected.acc_norm)
    assert close(judges, found["normalized_accuracy"].error, expected.acc_norm_stderr)


def test_wikitext_is_the_harness_own(harness, judges):
    items = read_items("wikitext2", [DATA / "wiki.test.tokens"])
    # one that is shorter than a window, one that fills it but for end-of-text, and one by one more
    tokens = judges.ours[1].encode("a lamp and " * BLOCK_SIZE)
    pages = [judges.ours[1].decode(tokens[:n]) for n in (1, BLOCK_SIZE - 1, BLOCK_SIZE, 91, 180)]
    rows = [{"page": page} for page in [*(item.page for item in items), *pages]]
    found = run_task(*judges.ours, "wikitext2", rows)
    expected = harness(*judges.theirs, "wikitext/wikitext.yaml", rows)
    assert len(items) == 3
    for name in ("word_perplexity", "byte_perplexity"):
        assert close(judges, math.log(found[name].value), math.log(getattr(expected, name)))
    assert close(judges, found["bits_per_byte"].value, expected.bits_per_byte)
    same = score_items(
        *judges.ours, "wikitext103", read_items("wikitext103", [DATA / "wiki.test.tokens"])
    )
    assert same["word_perplexity"].value == pytest.approx(
        run_task(*judges.ours, "wikitext2", rows[:3])["word_perplexity"].value, rel=1e-12
    )


def test_a_text_is_detokenised_as_the_harness_does(harness):
    theirs = harness.load(harness.folder / "wikitext" / "wikitext.yaml")["doc_to_target"]

    @given(st.lists(st.sampled_from(FRAGMENTS), max_size=40).map("".join))
    @quick
    def same(text):
        assert detokenised(text) == theirs({"page": text})

    same()


def test_a_perplexity_per_token_is_that_of_the_usual_recipe(judges):
    """All lines joined by blank lines, cut into windows, each with its labels to transformers."""
    model, tokenizer = judges.theirs
    file = DATA / "wiki.test.tokens"
    lines = file.read_text("utf-8").splitlines(keepends=True)
    text = "\n\n".join("" if line.isspace() else line for line in lines)
    windows = tokenizer(text, return_tensors="pt").input_ids.split(BLOCK_SIZE, dim=1)
    total = count = 0
    for ids in windows:
        logits = model(ids).logits[0, :-1].double()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    found = score_items(*judges.ours, "wikitext2", read_items("wikitext2", [file]))
    assert close(judges, math.log(found["token_perplexity"].value), total / count)
