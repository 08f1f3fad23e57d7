"""Where a run stands: what state.json of a checkpoint holds besides settings.

Imports nothing heavy: a command line is completed from it before torch is there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..arguments import flag
from .record import JsonObject, Metrics, is_count, is_measured

FROM_TEXT = ("data", "batch_size", "block_size")  # facts that are known when the text is


@dataclass(frozen=True)
class TrainState:
    """Where a run stands: all that decides its future besides weights, optimizer and settings."""

    step: int = 0  # optimizer steps done
    best_step: int = 0
    best_val_loss: float | None = None  # nats per token
    evaluations_without_gain: int = 0
    first_val_loss: float | None = None  # of the weights the run began with
    micro_batch_size: int = 0  # sequences computed at once; 0 is not decided yet
    unjudged: Metrics | None = None  # what a step measured whose evaluation is still to come
    n_skipped: int = 0  # steps that float16 overflow skipped
    skipped_in_a_row: int = 0

    def ended(self, max_steps: int) -> bool:
        """Whether a run of so many steps has nothing left to do."""
        return self.step >= max_steps and self.unjudged is None

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> TrainState:
        """The state as it was written.

        Raises TypeError for fields that only another version has, which may decide something too,
        and ValueError for values that no run has.
        """
        for name, value in stored.items():
            if not _is_possible(name, value):
                raise ValueError(f"{name} is {value!r:.60}")
        unjudged = stored.get("unjudged")
        if unjudged is not None:
            unjudged = Metrics.from_json({"step": stored.get("step", 0), **unjudged})
        return cls(**{**stored, "unjudged": unjudged})

    def to_json(self) -> dict[str, Any]:
        """The state as JSON can hold it; an evaluation before the first step is an empty object."""
        found = {part.name: getattr(self, part.name) for part in fields(self)}
        if self.unjudged is not None:
            nothing_measured = self.unjudged == Metrics(self.step)
            found["unjudged"] = {} if nothing_measured else self.unjudged.to_json()
        return found


@dataclass(frozen=True)
class Facts(JsonObject):
    """What a resumed run must have in common with its beginning; in the file, and in messages, by
    the flag that decides it. None is not given, or not asked for by the version that wrote it.
    """

    preset: str | None = None
    model: str | None = None  # a folder, or an id of the Hub, as it was named at the beginning
    train_vocabulary: bool | None = None  # None, not False, where that was not asked for
    vocab_size: int | None = None  # None where it is the preset's or the model's
    tokenizer: str | None = None  # a hash of its vocabulary
    val_fraction: float | None = None
    document_mask: bool | None = None
    mask_prompt: bool | None = None
    special_tokens: bool | None = None  # None, not False, where they are text
    add_tokens: tuple[str, ...] | None = None  # None, not (), where there are none
    lora_rank: int | None = None
    lora_alpha: float | None = None
    seed: int | None = None
    data: str | None = None  # a hash of all text
    batch_size: int | None = None  # sequences per step
    block_size: int | None = None  # tokens per sequence

    @classmethod
    def json_keys(cls) -> dict[str, str]:
        """The flags; the tokenizer has none."""
        return {name: name if name == "tokenizer" else flag(name) for name in super().json_keys()}

    def differences(
        self, now: Facts, but: Collection[str] = ()
    ) -> dict[str, tuple[object, object]]:
        """By flag, (here, now) of each fact that is another one now; `but` names fields that do not
        count.
        """
        found = {}
        for name, key in self.json_keys().items():
            values = getattr(self, name), getattr(now, name)
            if name not in but and values[0] != values[1]:
                found[key] = values
        return found


def _is_possible(name: str, value: object) -> bool:
    """Whether a run can have this value in its state; what the name is, is asked elsewhere."""
    if name == "unjudged":
        return value is None or (isinstance(value, dict) and all(map(is_measured, value.values())))
    if name in ("best_val_loss", "first_val_loss"):
        return is_measured(value)
    return is_count(value) or name not in TrainState.__dataclass_fields__
