"""Every way to compute agrees with its plain twin, reached as a user reaches it."""

import contextlib
import functools
import io
import json
import shlex
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import walk
from audit import every_model, unregistered
from hf_models import randomise, token_ids
from minigpt2 import equivalences
from minigpt2.decoding.drafters import ModelDrafter, NGramDrafter
from minigpt2.equivalences import (
    PLAIN,
    WAYS,
    Way,
    difference,
    restore,
    swap,
    way_of_loaded,
    ways_of,
)
from minigpt2.evaluation import scorer as scorer_module
from minigpt2.evaluation.agreement import logprob_error, shortfall
from minigpt2.evaluation.scorer import Scorer
from minigpt2.generate import generate
from minigpt2.loss import MOST_LOGITS, summed_loss
from minigpt2.model import GPT2, GPT2Config
from minigpt2.runs.folder import RunFolder
from minigpt2.sampling import SamplingConfig, row_generator
from minigpt2.tokenizer import Tokenizer
from minigpt2.training import c_parts, dropout
from minigpt2.training.ways import SWAPS
from scripts import ROOT, exit_code, later_wins, run_here, tiny_folder
from text_files import lamp_lines

GREEDY = SamplingConfig(temperature=0)
needs_a_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    # one for all: the C function is built once
    monkeypatch.setenv("MINIGPT2_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


# the table


CASES = [
    (way, make, file)
    for way, makes in walk.MODELS.items()
    for make in makes
    for file in walk.FILES_OF.get(way, walk.FILES)
]
ADAPTER_CASES = [(way, make) for way, makes in walk.ADAPTERS.items() for make in makes]
CUDA_CASES = [(way, make) for way, makes in walk.ON_CUDA.items() for make in makes]
IN_A_CACHE = ("cache", "prompt in parts", "rows of different length")


def test_every_row_of_the_table_is_walked():
    forward = {way for way, *_ in CASES + ADAPTER_CASES + CUDA_CASES} | {*IN_A_CACHE}
    walked = {
        "forward": forward | {"documents apart"},
        "text": {*DRAFTERS},
        "training": {"loss in chunks", "16-bit dropout", *TRAINING},
    }
    for kind, ways in walked.items():
        assert ways == {way for way, row in WAYS.items() if row.kind == kind}


@pytest.mark.parametrize("name", WAYS)
def test_every_twin_is_plain_or_a_row_whose_own_twin_is(name):
    twin = WAYS[name].twin
    assert twin == PLAIN or WAYS[twin].twin == PLAIN


# models that compute in another way


def case_id(value):
    return value.replace(" ", "-") if isinstance(value, str) else ""


@pytest.mark.parametrize(("way", "make", "file"), CASES, ids=case_id)
def test_logits_are_those_of_the_plain_twin(walked_folders, way, make, file):
    if way in walk.IN_C and shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    model, twin = make(walked_folders[file]), walk.TWINS[WAYS[way].twin](walked_folders[file])
    assert walk.goes(model, way) or way in walk.UNMARKED
    found, where = walk.worst(model, twin)
    assert found <= WAYS[way].tolerance, where


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_a_compiler)])
def test_a_loaded_model_goes_the_way_that_is_named(walked_folders, dtype, compiled):
    way = way_of_loaded("cpu", dtype, compiled=compiled)
    model = walk.loaded(dtype=dtype, compiled=compiled)(walked_folders["tied"])
    assert walk.goes(model, way) or way in walk.UNMARKED
    assert way == dtype or way not in walk.UNMARKED
    for found in ("bfloat16", "float16"):
        assert (way == found) is (model.ln_f.weight.dtype == getattr(torch, found))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("compiled", [False, True])
def test_every_way_that_a_model_is_loaded_in_is_a_row(dtype, compiled):
    for device in ("cpu", "cuda"):
        assert WAYS[way_of_loaded(device, dtype, compiled=compiled)].device in ("any", device)


@pytest.mark.parametrize("way", IN_A_CACHE)
@pytest.mark.parametrize("file", walk.FILES)
def test_texts_in_a_cache_are_read_as_they_are_without(walked_folders, file, way):
    model = walk.plain(walked_folders[file])
    form, plain_form = walk.FORMS[way]
    for n_rows, n_tokens in walk.SHAPES:
        idx = token_ids(walk.SHAPE["vocab_size"], n_rows, walk.PROMPT + n_tokens)
        assert WAYS[way].agrees(form(model, idx), plain_form(model, idx)), (n_rows, n_tokens)


@pytest.mark.parametrize(("way", "make"), ADAPTER_CASES, ids=case_id)
def test_adapters_are_what_is_added_to_the_matrices_by_hand(walked_folders, way, make):
    folder = walked_folders["peft" if way == "peft's adapter" else "LoRA"]
    model, twin = make(folder), walk.added_by_hand(folder)
    assert walk.goes(model, way) or way in walk.UNMARKED
    found, where = walk.worst(model, twin)
    assert found <= WAYS[way].tolerance, where
    base = walk.plain(walk.base_of(folder))
    assert walk.worst(twin, base)[0] > 0.1, "the adapter changes little: the check is weak"


@torch.no_grad()
@pytest.mark.parametrize("n_rows", [1, 3])
def test_documents_kept_apart_are_read_as_if_each_stood_alone(walked_folders, n_rows):
    model, way = walk.plain(walked_folders["tied"]), WAYS["documents apart"]
    lengths = [1, 2, 3, 9]
    idx = token_ids(walk.SHAPE["vocab_size"], n_rows, sum(lengths))
    documents = torch.arange(4).repeat_interleave(torch.tensor(lengths)).repeat(n_rows, 1)
    found = model.head(model.hidden(idx, documents=documents))
    expected = torch.cat([model(part) for part in idx.split(lengths, dim=1)], dim=1)
    assert way.agrees(found, expected)
    assert not way.agrees(model(idx), expected), "the check is weak"


@pytest.mark.gpu
@pytest.mark.parametrize("file", walk.FILES)
@pytest.mark.parametrize(("way", "make"), CUDA_CASES, ids=case_id)
def test_logits_on_cuda_are_those_of_the_plain_twin(walked_folders, file, way, make):
    model, twin = make(walked_folders[file]), walk.TWINS[WAYS[way].twin](walked_folders[file])
    assert walk.goes(model, way) or way in walk.UNMARKED
    found, where = walk.worst(model, twin, "cuda")
    assert found <= WAYS[way].tolerance, where


# commands that write text


PROMPTS = ["The lamp", "A", "Two men in a boat, and a wall"]
COMMANDS = [way for way, row in WAYS.items() if row.reached.startswith("sample.py")]


def command_of(way, walked_folders):
    """The flags of the command by which a way is reached, the model whose text it writes, and the
    twin of that."""
    flags = shlex.split(WAYS[way].reached)[1:]
    folders = {"PEFT_FOLDER": "peft", "ADAPTER_FOLDER": "LoRA", "FLOAT16_FOLDER": "float16"}
    name = folders[flags[1]] if "--model" in flags else "tied"
    folder = walked_folders[name]
    twin = walk.added_by_hand if name in ("peft", "LoRA") else walk.TWINS[WAYS[way].twin]
    flags = flags[2:] if "--model" in flags else flags
    flags = [str(walked_folders["draft"]) if flag == "DRAFT_FOLDER" else flag for flag in flags]
    return flags, folder, twin(folder)


@pytest.mark.parametrize(
    "way",
    [pytest.param(w, marks=pytest.mark.gpu if WAYS[w].device == "cuda" else ()) for w in COMMANDS],
    ids=case_id,
)
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "three"])
def test_a_command_writes_the_text_of_the_plain_twin(
    walked_folders, way, prompts, tmp_path, capsys
):
    flags, folder, twin = command_of(way, walked_folders)
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    given = ["--prompts-file", tmp_path / "prompts.txt", "--temperature", 0, "--json"]
    device = [] if "--device" in flags else ["--device", "cpu"]
    done = run_here(
        capsys, "sample", "--model", folder, *given, "--max-new-tokens", 13, *flags, *device
    )
    assert done.code == 0, done.err
    tokenizer, rows = Tokenizer.from_pretrained(folder), map(json.loads, done.out.splitlines())
    n_new = 0
    for prompt, row in zip(prompts, rows):
        text, ids = tokenizer.encode(prompt), row["ids"]
        tolerance = max(WAYS[way].tolerance, equivalences.ROUNDED)
        assert shortfall(twin, text, ids) <= 2 * tolerance
        assert logprob_error(twin, text, ids, row["logprobs"]) <= 2 * tolerance
        n_new += len(ids)
    assert n_new >= 13 * len(prompts) // 2, "the model ends its texts at once"


def text_guesses(walked_folders):
    return NGramDrafter(shortest=1)


def draft_guesses(walked_folders):
    small = walk.plain(walked_folders["draft"])
    return ModelDrafter(small, GREEDY, [row_generator(1, row) for row in range(3)])


DRAFTERS = {"guesses from the text": text_guesses, "guesses of a draft model": draft_guesses}


@pytest.mark.parametrize("way", DRAFTERS, ids=case_id)
@pytest.mark.parametrize("n_new", [1, 2, 3, 9, 70])
@pytest.mark.parametrize("n_rows", [1, 3])
def test_guessing_ahead_writes_the_same_greedy_text(walked_folders, way, n_new, n_rows):
    model = walk.plain(walked_folders["tied"])
    rows = [token_ids(293, 1, length)[0].tolist() for length in (5, 1, 29)][:n_rows]
    options = {"max_new_tokens": n_new, "sampling": GREEDY}
    drafter = DRAFTERS[way](walked_folders)
    assert generate(model, rows, drafter=drafter, **options) == generate(model, rows, **options)


# training


STEPS = 4
FLAGS = ["--max-steps", STEPS, "--batch-size", 4, "--micro-batch-size", 2, "--learning-rate", 0.01]
FLAGS += ["--eval-every", 2, "--dropout", 0.1]
NO_DROPOUT = ["--dropout", 0, "--micro-batch-size", 4]  # which would draw other numbers
TRAINING = {  # what is given besides the way's own flags, and to its plain twin
    "micro-batches": NO_DROPOUT,
    "training in C": NO_DROPOUT,
    "compiled blocks": NO_DROPOUT,
    "recomputed blocks": [],
    "bfloat16 autocast": NO_DROPOUT,
    "float16 autocast": NO_DROPOUT,
    "DDP": [],
    "FSDP": [],
    "resume": [],
}
SLOW = ("compiled blocks", "DDP", "FSDP")  # a compiler, or processes of their own


@dataclass(frozen=True)
class Trained:
    """What a short run of train.py left."""

    folder: Path
    messages: str

    @property
    def losses(self):
        """The loss of every step and of every evaluation."""
        lines = RunFolder(self.folder).read_metrics()
        assert [line.step for line in lines] == list(range(STEPS + 1))
        losses = [v for line in lines for v in (line.loss, line.val_loss) if v is not None]
        return torch.tensor(losses, dtype=torch.float64)

    @property
    def weights(self):
        """All weights after the last step."""
        model = GPT2.from_pretrained(RunFolder(self.folder).checkpoints()[0])
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


class Runs:
    """Runs train.py with a tiny model, once for the same flags."""

    def __init__(self, place):
        self.place = place
        tiny_folder(place / "model")
        (place / "text.txt").write_text("".join(lamp_lines(120)))
        self.done = {}

    def of(self, flags, processes=1):
        key = (*map(str, flags), processes)
        if key not in self.done:
            self.done[key] = self.train(flags, processes, self.place / f"run{len(self.done)}")
        return self.done[key]

    def train(self, flags, processes, out, *, model=True):
        argv = ["--model", self.place / "model"] if model else []
        argv = later_wins(*argv, "--data", self.place / "text.txt", "--out", out, *FLAGS, *flags)
        if processes > 1:
            run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            run += [f"--nproc-per-node={processes}", str(ROOT / "tests/helpers/audited_train.py")]
            done = subprocess.run([*run, *argv], capture_output=True, text=True, timeout=240)
            assert done.returncode == 0, done.stderr
            return Trained(out, done.stderr)
        with (
            every_model() as made,
            contextlib.redirect_stderr(io.StringIO()) as err,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("default")  # torch's compiler uses what torch deprecates
            code = exit_code("train", *argv)
        assert code == 0, err.getvalue()
        assert made and not [problem for model in made for problem in problems_of(model)]
        return Trained(out, err.getvalue())


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


def problems_of(model):
    """What of a model that was tied was swapped without a note."""
    return unregistered(model, replace(model.config, tie_word_embeddings=True))


def training_case(way):
    marks = [pytest.mark.slow] if way in SLOW else []
    marks += [pytest.mark.gpu] if WAYS[way].device == "cuda" else []
    return pytest.param(way, marks=marks)


@pytest.mark.parametrize("way", [*map(training_case, TRAINING)], ids=case_id)
def test_a_short_run_has_the_losses_of_its_plain_twin(runs, way, monkeypatch):
    flags = shlex.split(WAYS[way].reached.partition("train.py")[2])
    processes = 2 if WAYS[way].reached.startswith("torchrun --nproc-per-node=2 ") else 1
    twin = runs.of(TRAINING[way])
    if way == "training in C" and not c_parts.c_trains():
        pytest.skip("needs a C compiler")
    if way == "compiled blocks":  # which on the CPU are those that C does not do
        monkeypatch.setattr(c_parts, "c_trains", lambda: False)
        run = runs.train([*TRAINING[way], *flags], processes, runs.place / "compiled blocks")
    elif way == "resume":
        run = Trained(shutil.copytree(twin.folder, runs.place / "resumed"), "")
        shutil.rmtree(run.folder / "checkpoints" / f"step-{STEPS:06d}")
        run = runs.train([*flags, *TRAINING[way]], 1, run.folder)
    else:
        run = runs.of([*TRAINING[way], *flags], processes)
    assert "torch.compile failed" not in run.messages
    if way in SWAPS:
        assert RunFolder(run.folder).newest().settings.way == way
    assert WAYS[way].agrees(run.losses, twin.losses)
    # AdamW divides each gradient by its size: where that is rounding, a weight goes either way
    assert WAYS[way].tolerance > 0 or torch.equal(run.weights, twin.weights)
    assert difference(run.weights, twin.weights) <= STEPS * 0.01


class LossOverAllLogits:
    """What `summed_loss` is in words: cross-entropy over all logits at once."""

    def __call__(self, x, weight, targets, scale=1.0):
        logits = F.linear(x, weight).flatten(0, -2)
        return scale * F.cross_entropy(logits, targets.flatten(), reduction="sum")


def test_a_run_whose_loss_is_made_in_chunks_has_the_losses_of_all_logits_at_once(runs, monkeypatch):
    found = {}
    for name, loss in (("chunks", functools.partial(summed_loss, most=300 * 7)),
                       ("at once", LossOverAllLogits())):  # fmt: skip
        monkeypatch.setattr(scorer_module, "summed_loss", loss)
        found[name] = runs.train(NO_DROPOUT, 1, runs.place / name)
    assert WAYS["loss in chunks"].agrees(found["chunks"].losses, found["at once"].losses)
    weights = [run.weights for run in found.values()]
    assert difference(*weights) <= 1e-3


def test_a_run_with_16_bit_dropout_has_the_losses_of_plain_attention_with_the_same_masks(
    runs, monkeypatch
):
    quick, whole = runs.of([]), []

    def at_once(*given):
        whole.append(given)
        return dropout.plain_attention(*given)

    monkeypatch.setattr(dropout, "attention_in_parts", at_once)
    plain = runs.train([], 1, runs.place / "whole masks")
    assert len(whole) == 2 * 2 * STEPS, "micro-batches, layers and steps"
    assert WAYS["16-bit dropout"].agrees(quick.losses, plain.losses)
    assert difference(quick.weights, plain.weights) <= STEPS * 0.01
    assert difference(quick.losses, runs.of(NO_DROPOUT).losses) > 1e-3, "nothing was dropped out"


def test_the_loss_of_a_long_text_of_the_true_vocabulary_is_made_in_chunks_and_the_same():
    model = GPT2(GPT2Config(n_embd=2, n_layer=1, n_head=1)).eval()
    randomise(model, std=0.3)
    idx = token_ids(50257, 1, 1025)
    assert MOST_LOGITS < 1024 * 50257, "all logits would fit into one chunk"
    gradients = []
    for loss_of in (Scorer(model), lambda x, y: LossOverAllLogits()(
            model.hidden(x), model.wte.weight, y)):  # fmt: skip
        model.zero_grad()
        loss = loss_of(idx[:, :-1], idx[:, 1:])
        loss.backward()
        gradients.append(torch.cat([loss.detach()[None], model.wte.weight.grad.flatten()]))
    assert WAYS["loss in chunks"].agrees(*gradients)
    assert difference(gradients[0][1:], gradients[1][1:]) <= 1e-4


# what is not in the table


SAMPLE = ["--prompt", "The lamp", "--max-new-tokens", 3, "--device", "cpu"]
SAMPLE_FLAGS = [
    "",
    "--dtype int8",
    "--dtype int8 --compile",
    "--dtype float32 --compile",
    "--dtype bfloat16",
    "--dtype float16",
    "--guess 4 --num-samples 2",
    "--draft DRAFT --dtype int8",
    "--model ADAPTER",
    "--model ADAPTER --dtype int8 --compile",
]
TRAIN_FLAGS = [
    "",
    "--compile",
    "--compile --activation-checkpointing",
    "--document-mask --dtype bfloat16",
    "--lora-rank 3 --merge-lora",
    "--lora-rank 3 --compile --activation-checkpointing",
    "--preset nano --block-size 16",
]


@pytest.mark.parametrize("flags", SAMPLE_FLAGS)
def test_after_sample_has_loaded_its_models_nothing_differs_without_a_note(
    walked_folders, flags, capsys
):
    places = {"DRAFT": walked_folders["draft"], "ADAPTER": walked_folders["LoRA"]}
    given = [places.get(word, word) for word in flags.split()]
    model = [] if "--model" in given else ["--model", walked_folders["tied"]]
    with every_model() as made:
        done = run_here(capsys, "sample", *SAMPLE, *model, *given)
    assert done.code == 0, done.err
    assert len(made) == 1 + ("--draft" in given)
    assert [problem for model in made for problem in problems_of(model)] == []


@pytest.mark.parametrize("flags", TRAIN_FLAGS)
def test_after_train_has_made_its_model_nothing_differs_without_a_note(runs, flags, monkeypatch):
    # machine code is not awaited: what is swapped is the same
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    preset = "--preset" in flags
    runs.train(flags.split(), 1, runs.place / f"audited{flags}", model=not preset)


def test_after_convert_has_written_its_folder_nothing_differs(walked_folders, tmp_path, capsys):
    with every_model() as made:
        done = run_here(capsys, "convert_weights", walked_folders["tied"], tmp_path / "copy")
    assert done.code == 0 and made
    assert [problem for model in made for problem in problems_of(model)] == []


class Another(torch.nn.Linear):
    pass


def change_a_class(model):
    model.h[1].mlp.c_fc = Another(34, 136)


def change_a_method(model):
    model.h[2].attn.attend = lambda q, k, v, mask: v


def change_the_whole_forward_pass(model):
    model.hidden = functools.partial(model.hidden, documents=None)


def compile_a_block(model):
    model.h[0].forward = torch.compile(model.h[0].forward, backend="eager")


def change_a_setting(model):
    model.ln_f.eps = 1e-3


def wrap_the_head_or_a_linear(model):
    name = "lm_head" if hasattr(model, "lm_head") else "h.1.mlp.c_proj"
    model.set_submodule(name, torch.nn.Sequential(model.get_submodule(name)))


def put_a_hook(model):
    model.h[0].mlp.register_forward_hook(lambda module, inputs, output: output)


def transpose_a_matrix(model):
    weight = model.h[0].attn.c_proj.weight
    weight.data = weight.data.T.contiguous().T


def add_a_head(model):
    model.lm_head = torch.nn.Linear(34, 293, bias=False)


def remove_a_block(model):
    model.h = model.h[:-1]


UNREGISTERED = [
    change_a_class,
    change_a_method,
    change_the_whole_forward_pass,
    compile_a_block,
    change_a_setting,
    wrap_the_head_or_a_linear,
    put_a_hook,
    transpose_a_matrix,
    add_a_head,
    remove_a_block,
]


@pytest.mark.parametrize("change", UNREGISTERED)
def test_a_swap_without_a_note_is_found(walked_folders, change):
    model = walk.plain(walked_folders["tied"])
    assert problems_of(model) == []
    change(model)
    assert problems_of(model)


def transposes(model):
    """Whether a matrix is a parameter of a plain Linear still, which can lie otherwise."""
    return type(model.h[0].attn.c_proj) is torch.nn.Linear


@pytest.mark.parametrize("change", UNREGISTERED)
@pytest.mark.parametrize("way", ["LoRA beside", *walk.MODELS], ids=case_id)
def test_a_swap_without_a_note_is_found_beside_those_with_one(walked_folders, way, change):
    if way == "LoRA beside":
        model = walk.beside(walked_folders["LoRA"])
    else:
        model = walk.MODELS[way][0](walked_folders["tied"])
    assert problems_of(model) == []
    if change is transpose_a_matrix and not transposes(model):
        return  # inside of what was put there as a whole
    change(model)
    assert problems_of(model)


def test_only_rows_of_the_table_can_be_swapped_in(walked_folders):
    model = walk.plain(walked_folders["tied"])
    with pytest.raises(AssertionError, match="'by hand' is no row of the table"):
        swap(model, "h.0.mlp.c_fc", lambda part: part, "by hand")


def test_a_note_names_the_ways_in_order_and_goes_with_its_part(walked_folders):
    model = walk.plain(walked_folders["tied"])
    for path, way in (("h.0.attn.c_attn", "int8"), ("h.0.attn.c_attn", "packed int8"),
                      ("h.0.forward", "compiled blocks")):  # fmt: skip
        assert swap(model, path, lambda part: part, way) is model
    assert ways_of(model)["h.0.attn.c_attn"] == ("int8", "packed int8")
    swap(model, "h.0.attn", lambda part: part, "int8")
    assert ways_of(model) == {"h.0.forward": ("compiled blocks",), "h.0.attn": ("int8",)}
    assert ways_of(walk.plain(walked_folders["tied"])) == {}


def test_a_method_that_is_restored_is_the_classs_own(walked_folders):
    model = walk.plain(walked_folders["tied"])
    swap(model, "h.1.forward", lambda forward: functools.partial(forward), "compiled blocks")
    restore(model, "h.1.forward")
    assert ways_of(model) == {} and problems_of(model) == []


@pytest.mark.parametrize("found", [[1.0, 2.1], [1.0, float("nan")], [float("inf"), 2.0]])
def test_a_difference_beyond_the_tolerance_or_of_what_is_no_number_is_one(found):
    way, expected = Way("somehow", tolerance=0.04), torch.tensor([1.0, 2.0])
    assert way.agrees(torch.tensor([1.07, 2.0]), expected)
    assert not way.agrees(torch.tensor(found), expected)
