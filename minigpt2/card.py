"""The README.md of a run folder: a model card as the Hugging Face Hub reads it, with what the run's
own records say and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath

from .checkpoint import RunFolder
from .files import write_text
from .hub import HUB_ID
from .record import (
    Record,
    as_list,
    best_of,
    clean,
    evaluations,
    number,
    perplexity,
    read_record,
    shown_perplexity,
    spread,
    summary,
    untuned_of,
)

logger = logging.getLogger(__name__)
MARK = re.compile(r"\n<!-- written by minigpt2, ([0-9a-f]{64}); it is left alone once edited -->\n")
MOST_ROWS = 40
ENGLISH_WEB = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
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


def write_card(run: RunFolder) -> None:
    """Write README.md into the run folder, unless one is there that somebody else wrote or
    edited.
    """
    path = run.path / "README.md"
    if path.exists() and not is_ours(path.read_bytes().decode("utf-8", errors="replace")):
        logger.info("%s is yours: left as it is", path)
        return
    write_text(path, signed(model_card(read_record(run))))


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
        f"**Result:** {summary(record.lines, pretrained=record.pretrained)}.",
        _data(record),
        _results(record),
        _settings(record),
        _usage(record),
        _limits(record),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def base_model(record: Record) -> str | None:
    """The Hub id that the run started from; None for random weights and for local folders."""
    source = record.part("model").get("source")
    if not record.pretrained or not isinstance(source, str) or not HUB_ID.fullmatch(source):
        return None
    return None if Path(source).exists() else source


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
    best = best_of(evaluations(record.lines))
    value = perplexity(best.val_loss) if best else None
    if value is not None and value < 1e30:
        lines += [
            "model-index:",
            f"- name: {_quoted(record.name)}",
            "  results:",
            "  - task:",
            "      type: text-generation",
            "    dataset:",
            f"      name: {_quoted('held-out text of ' + ', '.join(_names(record, 'paths')))}",
            "      type: text",
            "    metrics:",
            "    - type: perplexity",
            "      name: perplexity per token",
            f"      value: {value:.4f}",
        ]
    return "\n".join(["---", *lines, "---"])


def _introduction(record: Record) -> str:
    model, base = record.part("model"), base_model(record)
    data = _listed(_names(record, "paths"))
    size = _counted(model.get("n_parameters"), "parameters")
    what = f"A GPT-2 language model{f' with {size}' if size else ''}"
    if not record.pretrained:
        return f"{what}, trained from random weights on {data} with minigpt2."
    link = f"[{base}](https://huggingface.co/{base})" if base else "trained weights"
    how = ""
    if _is_lora(record):
        trained = _counted(model.get("n_trained"), "of them trained")
        how = f" as LoRA adapters of rank {model['lora_rank']}{f', {trained}' if trained else ''}"
    return f"{what}, fine-tuned from {link} on {data} with minigpt2{how}."


def _data(record: Record) -> str:
    data = record.part("data")
    own = _names(record, "val_paths") if as_list(data.get("val_paths")) else []
    held_out = f"from {_listed(own)}" if own else "held out of it"
    counts = [
        _counted(
            data.get("n_documents"), "document" if data.get("n_documents") == 1 else "documents"
        ),
        _counted(data.get("n_characters"), "characters"),
        _counted(data.get("n_train_tokens"), "tokens trained on"),
        _counted(data.get("n_val_tokens"), f"tokens {held_out} to judge it"),
    ]
    named = _listed(_names(record, "paths"))
    return "## Training data\n\n" + "; ".join([named, *filter(None, counts)]) + "."


def _results(record: Record) -> str:
    judged = evaluations(record.lines)
    if not judged:
        return ""
    best, untuned = best_of(judged), untuned_of(judged)
    kept = spread(judged, MOST_ROWS)
    if best and best not in kept:
        kept = sorted([*kept, best], key=lambda evaluation: evaluation.step)
    some = f", {len(kept)} of {len(judged):,} evaluations" if len(kept) < len(judged) else ""
    rows = [
        "## Results",
        "",
        f"On the held-out text, per token{some}:",
        "",
        "| step | loss (nats) | perplexity | |",
        "|---:|---:|---:|---|",
    ]
    for evaluation in kept:
        start = "untuned" if record.pretrained else "random weights"
        note = "**best**" if evaluation == best else start if evaluation == untuned else ""
        shown = shown_perplexity(evaluation.val_loss) if evaluation.finite else "not a number"
        rows.append(f"| {evaluation.step:,} | {evaluation.val_loss:.4f} | {shown} | {note} |")
    return "\n".join(rows)


def _settings(record: Record) -> str:
    settings = record.part("settings")
    rows = [
        f"| {label} | {settings[name]:g} |"
        for name, label in SETTINGS.items()
        if number(settings, name) is not None
    ]
    if not rows:
        return ""
    session = next((s for s in reversed(as_list(record.info.get("sessions"))) if s), {})
    versions = session.get("versions") if isinstance(session, dict) else None
    made = [
        f"{name} {_inline(version)}"
        for name, version in (versions if isinstance(versions, dict) else {}).items()
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
    return f"""## How to use

With minigpt2, from its own folder:

```
python sample.py --model FOLDER_OF_THIS_FILE --prompt "Once"
```

With {library}:

```python
{imports}

tokenizer = AutoTokenizer.from_pretrained(".")
model = {model_class}.from_pretrained(".")
inputs = tokenizer("Once", return_tensors="pt")
outputs = model.generate(**inputs, max_new_tokens=100, do_sample=True, temperature=0.8, top_p=0.95)
print(tokenizer.decode(outputs[0]))
```"""


def _limits(record: Record) -> str:
    base = base_model(record)
    if base and base.removeprefix("openai-community/") in ENGLISH_WEB:
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
    return bool(number(record.part("model"), "lora_rank"))


def _names(record: Record, field: str) -> list[str]:
    """The data's paths without their folders; a Windows path reads both kinds of slashes."""
    paths = as_list(record.part("data").get(field))
    names = [_inline(PureWindowsPath(str(path)).name) for path in paths[:10]]
    if len(paths) > 10:
        names.append(f"{len(paths) - 10} more")
    return [name for name in names if name] or ["text of its own"]


def _counted(value: object, what: str) -> str:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return f"{value:,} {what}" if is_count else ""


def _inline(text: object) -> str:
    """Text that stays in its line and its code span, and starts no markup."""
    return re.sub(r"[`<>|\[\]*\s]+", " ", clean(text)).strip()


def _quoted(text: str) -> str:
    return json.dumps(re.sub(r"\s+", " ", clean(text)), ensure_ascii=False)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
