"""Alignment by character spans, the default: each model reads its own natural tokens.

A receiver token of a message takes the sharer token that covers its last character, since that token has read the
same text. Template positions after a message take the sharer's last position of the same stretch of template: it has
read everything so far, and in the closing template everything there is. Positions before the first message are not
fused, and neither is the last token, which the receiver runs on the fused cache.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from c2c.alignment.base import Alignment, Chunk, Prompt
from c2c.errors import AlignmentError
from c2c.messages import Conversation
from c2c.prompting import Encoded, RenderOptions, encode, render, require_tokenizer, text_tokens
from c2c.tokens import left_pad


@dataclass(frozen=True)
class CharSpanAligner:
    """Align tokens by the characters that they cover.

    Attributes:
        fuse_template: fuse the template positions after a message as well.
        cue: text that the sharer alone reads after the opening of its turn, where the prompt gives no answer prefix of
            its own ("The answer is"): at its end the sharer is about to name an answer, and the receiver's closing
            template takes that position.
    """

    fuse_template: bool = True
    cue: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return name and options, for the fuser's config."""
        return {"name": "spans", "fuse_template": self.fuse_template} | ({"cue": self.cue} if self.cue else {})

    def align(
        self, receiver: Any, sharers: Sequence[Any], batch: Sequence[Conversation], options: RenderOptions
    ) -> list[Prompt]:
        """Align each conversation to a prompt of its own. See :class:`~c2c.alignment.base.Aligner`."""
        cues = self.cue and options.add_generation_prompt and not options.answer_prefix
        cued = replace(options, answer_prefix=self.cue) if cues else options
        prompts = []
        for index, conversation in enumerate(batch):
            ours = _encode(receiver, conversation, options, "receiver")
            theirs = [_encode(tokenizer, conversation, cued, "sharer") for tokenizer in sharers]
            last = len(ours.ids) - 1
            alignments = []
            for other in theirs:
                fused = [(0, t, s) for t, s in enumerate(self.pairs(ours, other)[:last]) if s is not None]
                if last < 1:
                    raise AlignmentError(
                        f"prompt {index} has one token for the receiver, which runs the last one on the fused cache: "
                        "nothing is left to fuse. Give a longer prompt, or let the receiver answer alone."
                    )
                if not fused:
                    raise AlignmentError(
                        f"no token of prompt {index} can be fused: no message text was found in both models' rendered "
                        f"prompts. Receiver reads {ours.rendered.text!r:.300}; sharer {other.rendered.text!r:.300}. "
                        "Check that neither chat template drops the message."
                    )
                alignments.append(Alignment.from_pairs(fused))
            skipped = {
                "last token, run on the fused cache": 1,
                "template before the first message": last - len(alignments[0]),
            }
            receiver_tokens, *sharer_tokens = (left_pad([one.ids], 0) for one in (ours, *theirs))
            chunks = (Chunk(last, tuple(alignments)),)
            prompts.append(Prompt(receiver_tokens, tuple(sharer_tokens), chunks, skipped))
        return prompts

    def pairs(self, receiver: Encoded, sharer: Encoded) -> list[int | None]:
        """Return for each receiver token the sharer token that it takes, or None."""
        starts = [start for start, _ in sharer.offsets]
        borders = _stretch_ends(sharer)
        result: list[int | None] = []
        last_message: int | None = None
        for token, message in enumerate(text_tokens(receiver)):
            mine, other = (None if message is None else side.rendered.spans[message] for side in (receiver, sharer))
            if mine is not None and other is not None:
                last_message = message
                (start, end), trimmed = mine
                (other_start, other_end), other_trimmed = other
                character = min(receiver.offsets[token][1], end) - 1 - start + trimmed  # within the message as given
                target = min(max(character - other_trimmed + other_start, other_start), other_end - 1)
                result.append(max(bisect_right(starts, target) - 1, 0))
            else:
                result.append(borders[last_message] if last_message is not None and self.fuse_template else None)
        return result


def _stretch_ends(sharer: Encoded) -> dict[int, int]:
    """Find for each message the last sharer token before the text of the next one begins."""
    ends: dict[int, int] = {}
    current: int | None = None
    for token, message in enumerate(text_tokens(sharer)):
        current = message if message is not None else current
        if current is not None:
            ends[current] = token
    return ends


def _encode(tokenizer: Any, conversation: Conversation, options: RenderOptions, whose: str) -> Encoded:
    return encode(require_tokenizer(tokenizer, whose), render(tokenizer, conversation, options))
