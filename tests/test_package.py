"""What `from minigpt2 import ...` gives: all that its functions take and return, and errors that
speak of parameters.
"""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

import minigpt2
from minigpt2 import GPT2, GPT2Config, InputError, SamplingConfig, Tokenizer, TrainConfig
from minigpt2.corpus.options import TextConfig
from minigpt2.corpus.prepared import prepare
from minigpt2.system.precision import pick_device, pick_dtype
from minigpt2.training.batches import Batches, validation_batches
from minigpt2.training.plan import make_plan, recipe_for

ROOT = Path(__file__).parent.parent
TINY = GPT2Config(vocab_size=257, block_size=11, n_embd=6, n_layer=2, n_head=2)
MODEL, BYTES = GPT2(TINY).eval(), Tokenizer.gpt2(257)


def classes_in(hint):
    """The classes of ours in an annotation."""
    if inspect.isclass(hint) and hint.__module__.split(".")[0] == "minigpt2":
        yield hint
    for part in get_args(hint):
        yield from classes_in(part) if not isinstance(part, (str, list)) else ()
        if isinstance(part, list):  # the arguments of a Callable
            for argument in part:
                yield from classes_in(argument)


def public_functions():
    """Every function that is exported, and every public method of a class that is."""
    for name in minigpt2.__all__:
        value = getattr(minigpt2, name)
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            for method, member in vars(value).items():
                member = getattr(member, "__func__", member)
                if inspect.isfunction(member) and (method == "__init__" or method[0] != "_"):
                    yield f"{name}.{method}", member


# what only what is between the layers sees
INNER = {"GPT2.read", "KVCache.layers", "KVCache.all_slots"}


FUNCTIONS = dict(public_functions())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_public_functions_take_and_return_is_exported(name):
    # names that stand behind TYPE_CHECKING in the modules
    names = {**vars(minigpt2), **{n: getattr(minigpt2, n) for n in minigpt2.__all__}}
    hints = get_type_hints(FUNCTIONS[name], localns={**names, "np": np, "torch": torch,
                                              "Tensor": torch.Tensor})  # fmt: skip
    ours = {found.__name__ for hint in hints.values() for found in classes_in(hint)}
    assert name in INNER or ours <= set(minigpt2.__all__)


def test_every_name_is_there_listed_and_typed():
    assert set(minigpt2.__all__) <= set(dir(minigpt2))
    assert set(minigpt2.__all__) == set(minigpt2._HOMES)
    for name in minigpt2.__all__:
        assert getattr(minigpt2, name) is not None
    source = Path(minigpt2.__file__).read_text().partition("if TYPE_CHECKING:")[2]
    typed = source.partition("__version__")[0].replace(",", " ").split()
    assert set(minigpt2.__all__) <= set(typed)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        minigpt2.nothing  # noqa: B018


def test_to_import_the_package_imports_nothing_heavy():
    code = "import sys, minigpt2; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "tiktoken", "huggingface_hub"} & set(done.stdout.split())


def short(tmp_path, **how):
    path = tmp_path / "a.txt"
    path.write_text("x")
    return prepare([path], BYTES, workers=1, **how)


WRONG = {
    "temperature": lambda _: SamplingConfig(temperature=-1),
    "top_k": lambda _: SamplingConfig(top_k=1.5),
    "learning_rate": lambda _: TrainConfig(learning_rate=-1),
    "batch_size": lambda _: TrainConfig(batch_size="8"),
    "epochs": lambda _: TrainConfig(epochs=1, max_steps=1),
    "min_characters": lambda _: TextConfig(min_characters=-1),
    "duplicates": lambda _: TextConfig(duplicates="dorp"),
    "text_field": lambda _: TextConfig(text_field=""),
    "csv_columns": lambda _: TextConfig(csv_columns="a,a"),
    "csv_delimiter": lambda _: TextConfig(csv_delimiter=";;"),
    "document_separator": lambda _: TextConfig(document_separator=""),
    "n_layer": lambda _: GPT2Config(n_layer=0),
    "dtype": lambda _: minigpt2.load("/nowhere", device="cpu", dtype="int4"),
    "device": lambda _: minigpt2.load("/nowhere", device="gpu"),
    "device cuda": lambda _: pick_device("cuda:77"),
    "dtype float16": lambda _: pick_dtype("float16", torch.device("cpu"), training=True),
    "max_new_tokens": lambda _: minigpt2.complete(MODEL, BYTES, "x", max_new_tokens=-1),
    "seed": lambda _: minigpt2.generate(MODEL, [[1]], max_new_tokens=1, seed="1"),
    "ban": lambda _: minigpt2.complete(MODEL, BYTES, "x", ban=[5]),
    "rows": lambda _: minigpt2.generate(MODEL, [1], max_new_tokens=1),
    "rank": lambda _: minigpt2.add_lora(GPT2(TINY), rank=0, alpha=1),
    "alpha": lambda _: minigpt2.add_lora(GPT2(TINY), rank=1, alpha="1"),
    "block_size": lambda _: make_plan(
        TrainConfig(block_size=12), TINY, recipe_for(None, lora=False), n_tokens=99
    ),
    "block_size shorter": lambda _: Batches(np.zeros(5, np.uint16), block_size=11, batch_size=1,
                                            seed=1),
    "val_fraction": lambda _: validation_batches(np.zeros(1, np.uint16), block_size=3,
                                                 batch_size=1),
    "min_characters lower": lambda tmp: short(tmp, text=TextConfig(min_characters=99)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_errors_of_the_library_speak_of_parameters(name, tmp_path):
    with pytest.raises(InputError) as caught:
        WRONG[name](tmp_path)
    told = str(caught.value)
    assert name.split()[0] in told and "--" not in told and "\n" not in told


def test_scores_that_are_no_numbers_are_told_without_flags():
    broken = GPT2(TINY).eval()
    with torch.no_grad():
        broken.ln_f.weight.fill_(float("nan"))
    with pytest.raises(InputError, match=r"not finite at new token 1: .*try dtype float32$"):
        minigpt2.generate(broken, [[1]], max_new_tokens=1)


def test_pyright_reads_how_the_library_is_used():
    settings = (ROOT / "pyproject.toml").read_text().partition("[tool.pyright]")[2]
    assert '"tests/typed_use.py"' in settings.partition("typeCheckingMode")[0]
    assert "assert_type(model(idx), torch.Tensor)" in (ROOT / "tests/typed_use.py").read_text()
