"""Where an evaluation stands, kept in the cache, so that it goes on after whatever ended it.

The name of the file is a hash of all that decides the sums. It can be deleted at any time.
"""

from __future__ import annotations

import contextlib
import logging
import time

from ..corpus.cached import hash_of
from ..errors import InputError
from ..system.files import cache_folder, read_json, write_json
from .corpus_score import Sums

logger = logging.getLogger(__name__)
SECONDS = 10.0  # between two writings: what a killed process has to do again


class KeptSums:
    """A file with the sums of the groups of windows that were done."""

    def __init__(self, key: object) -> None:
        """`key`: JSON values that decide the sums."""
        self._path = cache_folder("evaluations") / f"{hash_of(key)}.json"
        self._kept, self._next = Sums(), time.monotonic() + SECONDS
        self._writes = True

    def read(self) -> Sums | None:
        """What was kept; None where nothing was, or nothing that can be read."""
        with contextlib.suppress(InputError, ValueError, TypeError):
            self._kept = Sums.from_json(read_json(self._path))
            return self._kept
        return None

    def update(self, sums: Sums) -> None:
        """Keep these, unless the last ones were kept a moment ago."""
        if time.monotonic() >= self._next:
            self.write(sums)

    def write(self, sums: Sums) -> None:
        """Keep these, in one step; where that cannot be done it is said, once, and not tried again:
        the evaluation is worth more.
        """
        if self._writes and sums.groups > self._kept.groups:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_json(self._path, sums.to_json())
                self._kept = sums
            except OSError as problem:
                self._writes = False
                reason = problem.strerror or problem
                logger.warning(
                    "%s cannot be written: %s; if this is stopped, it begins anew",
                    self._path,
                    reason,
                )
        self._next = time.monotonic() + SECONDS

    def remove(self) -> None:
        """Let go of them, and of what a process left that was killed while it wrote them."""
        with contextlib.suppress(OSError):
            for path in [self._path, *self._path.parent.glob(f".{self._path.name}.*.tmp")]:
                path.unlink(missing_ok=True)
