"""The README.md of a run folder: a model card as the Hub reads it, from the run's records."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import PureWindowsPath

from ..hub.names import HUB_ID
from ..hub.pins import public_model
from ..loss import perplexity
from ..system.files import write_text
from .folder import RunFolder
from .record import (
    Record,
    Session,
    best_of,
    evaluations,
    number,
    spread,
    untuned_of,
)
from .wording import BITS, clean, shown_bits, shown_perplexity, summary

logger = logging.getLogger(__name__)
MARK = re.compile(r"\n<!-- written by minigpt2, ([0-9a-f]{64}); it is left alone once edited -->\n")
MOST_ROWS = 40
SETTINGS = {
    "max_steps": "steps",
    "batch_size": "sequences per step",
    "block_size": "tokens per sequence",
    "learning_rate": "peak learning rate",
    "warmup_steps": "warm-up steps",
    "weight_decay": "weight decay",
    "grad_clip": "gradient clipping",
    "dropout": "dropout",
    "seed": "seed",
}
CHAT_INPUTS = """tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hello"}],
    add_generation_prompt=True, return_dict=True, return_tensors="pt",
)"""


def write_card(run: RunFolder) -> None:
    """Write README.md into the run folder, unless one is there that somebody else wrote or
    edited.
    """
    path = run.path / "README.md"
    if path.exists() and not is_ours(path.read_bytes().decode("utf-8", errors="replace")):
        logger.info("%s is yours: left as it is", path)
        return
    write_text(path, signed(model_card(run.read_record())))


def signed(card: str) -> str:
    """A card with a comment that tells whether it was edited later."""
    digest = hashlib.sha256(card.encode()).hexdigest()
    return f"{card}\n<!-- written by minigpt2, {digest}; it is left alone once edited -->\n"


def is_ours(text: str) -> bool:
    """Whether this is a signed card, as it was written."""
    text = text.replace("\r\n", "\n")  # Git may have changed the line ends
    found = MARK.search(text)
    return found is not None and signed(text[: found.start()]) == text


def model_card(record: Record) -> str:
    """The card of a run as Markdown with YAML front matter.

    Files are named without their folders, which are nobody else's business.
    """
    parts = [
        _front_matter(record),
        f"# {_inline(record.name)}",
        _introduction(record),
        f"**Result:** {summary(record.metrics, pretrained=record.pretrained)}.",
        _data(record),
        _results(record),
        _settings(record),
        _usage(record),
        _limits(record),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def base_model(record: Record) -> str | None:
    """The Hub id that the run started from; None for random weights and for local folders.

    Runs that do not say which it was have one only if it is the name of a public model.
    """
    source, kind = record.info.model.source, record.info.model.source_kind
    if not record.pretrained or source is None or not HUB_ID.fullmatch(source):
        return None
    return source if kind == "hub" or (kind is None and public_model(source)) else None


def _front_matter(record: Record) -> str:
    """Strings are quoted as JSON, which is YAML too; numbers are plain."""
    lora, base = _is_lora(record), base_model(record)
    lines = [
        f"library_name: {'peft' if lora else 'transformers'}",
        "pipeline_tag: text-generation",
        *([f"base_model: {_quoted(base)}"] if base else []),
        "tags:",
        *(f"- {tag}" for tag in ("gpt2", "minigpt2", *(["lora"] if lora else []))),
    ]
    best = best_of(evaluations(record.metrics))
    value = perplexity(best.val_loss) if best else None
    if best and value is not None and value < 1e30:
        data = ", ".join(_names(record.info.data.paths))
        lines += [
            "model-index:",
            f"- name: {_quoted(record.name)}",
            "  results:",
            "  - task:",
            "      type: text-generation",
            "    dataset:",
            f"      name: {_quoted(f'held-out text of {data}')}",
            "      type: text",
            "    metrics:",
            "    - type: perplexity",
            "      name: perplexity per token",
            f"      value: {value:.4f}",
        ]
        if best.bits_per_byte is not None:
            lines += [
                "    - type: bits_per_byte",
                "      name: bits per byte of text",
                f"      value: {best.bits_per_byte:.4f}",
            ]
    return "\n".join(["---", *lines, "---"])


def _introduction(record: Record) -> str:
    model, base = record.info.model, base_model(record)
    data = _listed(_names(record.info.data.paths))
    size = _counted(model.n_parameters, "parameters")
    what = f"A GPT-2 language model{f' with {size}' if size else ''}"
    if not record.pretrained:
        return f"{what}, trained from random weights on {data} with minigpt2."
    link = f"[{base}](https://huggingface.co/{base})" if base else "trained weights"
    how = ""
    if _is_lora(record):
        trained = _counted(model.n_trained, "of them trained")
        how = f" as LoRA adapters of rank {model.lora_rank}{f', {trained}' if trained else ''}"
    return f"{what}, fine-tuned from {link} on {data} with minigpt2{how}."


def _data(record: Record) -> str:
    data = record.info.data
    held_out = f"from {_listed(_names(data.val_paths))}" if data.val_paths else "held out of it"
    counts = [
        _counted(data.n_documents, "document" if data.n_documents == 1 else "documents"),
        _counted(data.n_characters, "characters"),
        _counted(data.n_train_tokens, "tokens trained on"),
        _counted(data.n_val_tokens, f"tokens {held_out} to judge it"),
    ]
    named = _listed(_names(data.paths))
    return "## Training data\n\n" + "; ".join([named, *filter(None, counts)]) + "."


def _results(record: Record) -> str:
    judged = evaluations(record.metrics)
    if not judged:
        return ""
    best, untuned = best_of(judged), untuned_of(judged)
    kept = spread(judged, MOST_ROWS)
    if best and best not in kept:
        kept = sorted([*kept, best], key=lambda evaluation: evaluation.step)
    has_bits = any(evaluation.bits_per_byte is not None for evaluation in kept)
    some = f", {len(kept)} of {len(judged):,} evaluations" if len(kept) < len(judged) else ""
    rows = [
        "## Results",
        "",
        f"On the held-out text, {'loss and perplexity ' * has_bits}per token{some}:",
        "",
        f"| step | loss (nats) | perplexity |{' bits per byte |' * has_bits} |",
        f"|---:|---:|---:|{'---:|' * has_bits}---|",
    ]
    for evaluation in kept:
        start = "untuned" if record.pretrained else "random weights"
        note = "**best**" if evaluation == best else start if evaluation == untuned else ""
        shown = shown_perplexity(evaluation.val_loss) if evaluation.finite else "not a number"
        bits = evaluation.bits_per_byte
        more = f" {'' if bits is None else shown_bits(bits)} |" * has_bits
        rows.append(f"| {evaluation.step:,} | {evaluation.val_loss:.4f} | {shown} |{more} {note} |")
    return "\n".join([*rows, *(["", BITS] if has_bits else [])])


def _settings(record: Record) -> str:
    settings = {name: getattr(record.info.settings, name) for name in SETTINGS}
    rows = [
        f"| {label} | {settings[name]:g} |"
        for name, label in SETTINGS.items()
        if number(settings[name]) is not None
    ]
    if not rows:
        return ""
    latest = next((s for s in reversed(record.info.sessions) if s != Session()), Session())
    made = [
        f"{name} {_inline(version)}"
        for name, version in (latest.versions or {}).items()
        if name in ("minigpt2", "torch", "python")
    ]
    table = "\n".join(["| setting | value |", "|---|---:|", *rows])
    text = "AdamW; linear warm-up, then a cosine. The weights are those of the best step above."
    return f"## Training\n\n{text}\n\n{table}" + (f"\n\nWith {', '.join(made)}." if made else "")


def _usage(record: Record) -> str:
    """How to load the folder this card lies in."""
    if _is_lora(record):
        library, model_class = "peft", "AutoPeftModelForCausalLM"
        imports = (
            "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer"
        )
    else:
        library, model_class = "transformers", "AutoModelForCausalLM"
        imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    ask, inputs = '--prompt "Once"', 'tokenizer("Once", return_tensors="pt")'
    if record.info.data.more.get("chats"):
        ask, inputs = "--interactive", CHAT_INPUTS
    return f"""## How to use

With minigpt2, from its own folder:

```
python sample.py --model FOLDER_OF_THIS_FILE {ask}
```

With {library}:

```python
{imports}

tokenizer = AutoTokenizer.from_pretrained(".")
model = {model_class}.from_pretrained(".")
inputs = {inputs}
outputs = model.generate(**inputs, max_new_tokens=100, do_sample=True, temperature=0.8, top_p=0.95)
print(tokenizer.decode(outputs[0]))
```"""


def _limits(record: Record) -> str:
    known = public_model(base_model(record) or "")
    if known is not None and known.of_english_web:
        nature = (
            "GPT-2 is a small language model of 2019, trained on English web pages: it carries "
            "their errors and prejudices, continues a text, and follows no instructions."
        )
    elif record.pretrained:
        nature = (
            "This is a small language model: it carries the errors and prejudices of all it was "
            "trained on, continues a text, and follows no instructions."
        )
    else:
        nature = (
            "This is a small language model that has read nothing but its training text: it "
            "continues a text, and follows no instructions."
        )
    return f"""## Intended use and limits

Made for writing in the manner of its training text, for experiments and for learning.

- {nature}
- What it writes is not checked for truth; do not rely on it where being wrong does harm.
- It may repeat its training text word for word, private parts included, the more so the longer
  it was trained.
- The perplexity above holds for text like the training text; it says nothing about other text.
- No licence is stated here: whoever publishes this model knows under which terms its training
  text and its first weights were given, and states one."""


def _is_lora(record: Record) -> bool:
    return bool(number(record.info.model.lora_rank))


def _names(paths: Sequence[str] | None) -> list[str]:
    """The data's paths without their folders; a Windows path reads both kinds of slashes."""
    paths = paths or ()
    names = [_inline(PureWindowsPath(path).name) for path in paths[:10]]
    if len(paths) > 10:
        names.append(f"{len(paths) - 10} more")
    return [name for name in names if name] or ["text of its own"]


def _counted(count: int | None, what: str) -> str:
    return f"{count:,} {what}" if count is not None and count > 0 else ""


def _inline(text: object) -> str:
    """Text that stays in its line and its code span, and starts no markup."""
    return re.sub(r"[`<>|\[\]*\s]+", " ", clean(text)).strip()


def _quoted(text: str) -> str:
    return json.dumps(re.sub(r"\s+", " ", clean(text)), ensure_ascii=False, allow_nan=False)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
