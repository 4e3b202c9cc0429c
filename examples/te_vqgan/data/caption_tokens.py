"""Captions as tokens: one for each word, comma and full stop, then an end token, then padding.

In the style ``numerals`` a start token stands in front, and the sizes are those of the authors' tokenizer.

Shape letters: N captions, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from examples.te_vqgan.data.captions import Grammar, split_words
from examples.te_vqgan.runs.checks import require

__all__ = ["CaptionTokenizer"]

_SPECIAL = ("<pad>", "<end>")
_START = "<start>"
# The authors' tokenizer has pieces of words too, which no caption is made of.
_UNUSED = "<unused>"
_PAPER_VOCAB, _PAPER_LENGTH = 78, 50
_BEFORE_PUNCTUATION = re.compile(r" (?=[,.])")


class CaptionTokenizer:
    """Turns the captions of a grammar into tokens of one length, and any tokens into text.

    Args:
        grammar: its words are the vocabulary, its longest caption and the end token fill ``length``. Its style
            ``numerals`` adds a start token, and ``vocab_size`` is 78 and ``length`` 50 as in the authors' Stage 2.

    Attributes:
        vocab: what each token stands for: padding, the end, the start if there is one, the words in alphabetical
            order, then what is not used.
        vocab_size: number of tokens.
        pad_token, end_token: 0 and 1.
        start_token: 2, or ``None`` where captions begin with their first word.
        length: T, the tokens of every encoded caption.

    Raises:
        ValueError: the style is ``numerals``, and the words or the longest caption do not fit.
    """

    vocab: tuple[str, ...]
    vocab_size: int
    pad_token: int
    end_token: int
    start_token: int | None
    length: int

    def __init__(self, grammar: Grammar) -> None:
        words = grammar.words
        special: tuple[str, ...] = _SPECIAL
        self.pad_token, self.end_token = range(len(_SPECIAL))
        self.start_token = None
        self.length = grammar.max_words + 1
        unused = 0
        if grammar.style == "numerals":
            special = (*_SPECIAL, _START)
            self.start_token = len(_SPECIAL)
            unused = _PAPER_VOCAB - len(special) - len(words)
            expected = f"names for at most {_PAPER_VOCAB - len(special)} words in all"
            require(unused >= 0, "grammar", expected, f"{len(words)} words")
            expected = f"one with at most {_PAPER_LENGTH - 2} words per caption"
            require(grammar.max_words <= _PAPER_LENGTH - 2, "grammar", expected, grammar.max_words)
            self.length = _PAPER_LENGTH
        self.vocab = (*special, *words, *[_UNUSED] * unused)
        self.vocab_size = len(self.vocab)
        self._tokens = {word: token for token, word in enumerate(words, start=len(special))}

    def encode(self, captions: Sequence[str]) -> Tensor:
        """The tokens of each caption.

        Shape:
            captions: N of them. result: (N, T) int64.

        Raises:
            ValueError: a word that is not in the vocabulary, or a caption longer than the grammar's longest.
        """
        require(not isinstance(captions, str), "captions", "a sequence of texts", repr(captions))
        tokens = np.full((len(captions), self.length), self.pad_token, np.int64)
        first = 0
        if self.start_token is not None:
            tokens[:, 0] = self.start_token
            first = 1
        for row, caption in enumerate(captions):
            words = split_words(caption)
            limit = self.length - first - 1
            if len(words) > limit:
                raise ValueError(f"captions[{row}] must be at most {limit} words, got {len(words)}: {caption!r}.")
            try:
                tokens[row, first : first + len(words)] = [self._tokens[word] for word in words]
            except KeyError as error:
                expected = "made of the vocabulary's words"
                raise ValueError(f"captions[{row}] must be {expected}, got {error} in {caption!r}.") from None
            tokens[row, first + len(words)] = self.end_token
        return torch.from_numpy(tokens)

    def decode(self, tokens: Tensor) -> list[str]:
        """The text of each row up to its end token, or all of it if there is none; padding and start are left out.

        Whatever a model emits has a text: ``decode(encode(captions)) == captions`` for what the grammar writes.

        Shape:
            tokens: (N, any number) integers in [0, vocab_size). result: N texts.

        Raises:
            ValueError: another shape, or an integer that is no token.
        """
        require(tokens.ndim == 2, "tokens", "(N, T)", tuple(tokens.shape))
        integers = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
        require(integers, "tokens", "integers", tokens.dtype)
        rows: list[list[int]] = tokens.tolist()
        for token in {token for row in rows for token in row}:
            require(0 <= token < self.vocab_size, "tokens", f"in [0, {self.vocab_size})", token)
        return [self._text(row) for row in rows]

    def _text(self, tokens: list[int]) -> str:
        if self.end_token in tokens:
            tokens = tokens[: tokens.index(self.end_token)]
        text = " ".join(self.vocab[token] for token in tokens if token not in (self.pad_token, self.start_token))
        return _BEFORE_PUNCTUATION.sub("", text)
