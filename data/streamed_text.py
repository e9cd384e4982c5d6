"""The text of tokens that come one after the other, in whole characters.

A character may be spread over several tokens, and decoders strip the space that a text begins with.
So each token is decoded together with those before it since the last but one piece of text, and a
text that ends in a broken character waits for the next token.
"""

from data.tokenizer import Tokenizer

# what decoders write for bytes that are no character, or not yet
_BROKEN = "\ufffd"


class StreamedText:
    """Turns token ids into pieces of text, which together are the text of all ids.

    Attributes:
        ids: all tokens so far.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skips = tokenizer, skip_special_tokens
        self.ids: list[int] = []
        # of the tokens that are decoded again, and of those that have no text yet
        self._start = self._next = 0

    def add(self, token_id: int) -> str:
        """Add a token, and return the text that is certain by now; it may be empty."""
        self.ids.append(token_id)
        piece = self._piece()
        if not piece or piece.endswith(_BROKEN):
            return ""
        self._start, self._next = self._next, len(self.ids)
        return piece

    def rest(self) -> str:
        """Return the text that waited for another token, where none comes."""
        piece = self._piece()
        self._start = self._next = len(self.ids)
        return piece

    def _piece(self) -> str:
        known = self._tokenizer.decode(self.ids[self._start : self._next], self._skips)
        return self._tokenizer.decode(self.ids[self._start :], self._skips)[len(known) :]
