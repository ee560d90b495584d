"""Tokens to text, one at a time."""

from __future__ import annotations

from typing import Any

_UNFINISHED = "\ufffd"


class Detokenizer:
    """The text of an answer as it grows. A character that is split over tokens appears when it is complete.

    Attributes:
        ids: the tokens so far.
        text: their text as far as it can't change any more.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.ids: list[int] = []
        self.text = ""
        self._anchor = self._read = 0  # the text of tokens before _read is out; decoding begins at _anchor

    def add(self, token: int) -> None:
        """Take one more token."""
        self.ids.append(token)
        known = self.decode(self.ids[self._anchor : self._read])
        whole = self.decode(self.ids[self._anchor :])
        if len(whole) > len(known) and not whole.endswith(_UNFINISHED):
            self.text += whole[len(known) :]
            self._anchor, self._read = self._read, len(self.ids)

    def finish(self) -> str:
        """The text of all tokens, unfinished characters included."""
        return self.decode(self.ids)

    def name(self, token: int) -> str:
        """One token as text, special ones by their names."""
        return str(self._tokenizer.decode([token]))

    def decode(self, ids: list[int]) -> str:
        """Tokens as text, special ones left out."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
