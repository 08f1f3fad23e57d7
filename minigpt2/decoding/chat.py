"""A conversation as prompts: its messages, within the model's window, by the chat template."""

from __future__ import annotations

import logging

from ..errors import InputError
from ..formats.chat import ANSWERS, Message
from ..tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class Conversation:
    """Questions and answers, of which the oldest are forgotten when they no longer fit."""

    messages: list[Message]
    """What was said and is remembered."""

    def __init__(self, tokenizer: Tokenizer, *, block_size: int, max_new_tokens: int) -> None:
        """Of the window of `block_size` tokens an answer has `max_new_tokens`, or half."""
        self._tokenizer, self._window = tokenizer, block_size
        self._longest = block_size - min(max_new_tokens, block_size // 2)
        self.messages = []

    def ask(self, text: str) -> list[int]:
        """The ids after which the answer to a text begins. The oldest turns, but no first message
        of a system, are left out where all are too long, which is said.

        Raises InputError for what the template refuses; the conversation is then as before.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self._tokenizer.encode_chat(self.messages)
            n_turns = 0
            while len(ids) > self._longest and self._forget_oldest():
                n_turns += 1
                ids = self._tokenizer.encode_chat(self.messages)
        except InputError:
            self.messages = before
            raise
        if n_turns:
            logger.info(
                "the conversation no longer fits into the model's %s tokens: %s forgotten",
                f"{self._window:,}",
                "its oldest turn is" if n_turns == 1 else f"its {n_turns} oldest turns are",
            )
        return ids

    def answered(self, text: str) -> None:
        """Remember an answer; without one the question is forgotten too."""
        if text:
            self.messages.append({"role": ANSWERS, "content": text})
        else:
            self.messages.pop()

    def _forget_oldest(self) -> bool:
        """Forget the first question and what follows it up to the next; False if it is the last."""
        asked = [n for n, message in enumerate(self.messages) if message["role"] == "user"]
        if len(asked) < 2:
            return False
        del self.messages[asked[0] : asked[1]]
        return True
