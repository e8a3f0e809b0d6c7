"""What keeps a guest from working and needs the user: logged once, and shown by ``vmbus status`` while it lasts."""

from __future__ import annotations

import logging

_logger = logging.getLogger(__name__)


class Problems:
    """The problems of one guest.

    Each has a ``key``, by which it is withdrawn, and a sentence that says what happened and what to do.
    """

    def __init__(self) -> None:
        self._sentences: dict[str, str] = {}

    def report(self, key: str, sentence: str) -> None:
        """Log and keep ``sentence``, unless ``key`` has this sentence already."""
        if self._sentences.get(key) != sentence:
            self._sentences[key] = sentence
            _logger.warning("%s", sentence)

    def withdraw(self, key: str) -> None:
        """Forget the problem ``key``; no effect if there is none."""
        self._sentences.pop(key, None)

    def keyed(self) -> dict[str, str]:
        """Return the sentences by their keys, for :meth:`report` in another process."""
        return dict(self._sentences)

    @property
    def sentences(self) -> list[str]:
        """The sentences, in the order in which the problems appeared."""
        return list(self._sentences.values())
