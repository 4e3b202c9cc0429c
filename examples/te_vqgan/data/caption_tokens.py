"""Captions as tokens: one for each word, comma and full stop, then an end token, then padding.

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
_BEFORE_PUNCTUATION = re.compile(r" (?=[,.])")


class CaptionTokenizer:
    """Turns the captions of a grammar into tokens of one length, and any tokens into text.

    Args:
        grammar: its words are the vocabulary, its longest caption and the end token fill ``length``.

    Attributes:
        vocab: what each token stands for: padding, the end, then the words in alphabetical order.
        vocab_size: number of tokens.
        pad_token, end_token: 0 and 1.
        length: T, the tokens of every encoded caption.
    """

    vocab: tuple[str, ...]
    vocab_size: int
    pad_token: int
    end_token: int
    length: int

    def __init__(self, grammar: Grammar) -> None:
        words = grammar.words
        self.vocab = (*_SPECIAL, *words)
        self.vocab_size = len(self.vocab)
        self.pad_token, self.end_token = range(len(_SPECIAL))
        self.length = grammar.max_words + 1
        self._tokens = {word: token for token, word in enumerate(words, start=len(_SPECIAL))}

    def encode(self, captions: Sequence[str]) -> Tensor:
        """The tokens of each caption.

        Shape:
            captions: N of them. result: (N, T) int64.

        Raises:
            ValueError: a word that is not in the vocabulary, or a caption longer than the grammar's longest.
        """
        require(not isinstance(captions, str), "captions", "a sequence of texts", repr(captions))
        tokens = np.full((len(captions), self.length), self.pad_token, np.int64)
        for row, caption in enumerate(captions):
            words = split_words(caption)
            if len(words) >= self.length:
                limit = self.length - 1
                raise ValueError(f"captions[{row}] must be at most {limit} words, got {len(words)}: {caption!r}.")
            try:
                tokens[row, : len(words)] = [self._tokens[word] for word in words]
            except KeyError as error:
                expected = "made of the vocabulary's words"
                raise ValueError(f"captions[{row}] must be {expected}, got {error} in {caption!r}.") from None
            tokens[row, len(words)] = self.end_token
        return torch.from_numpy(tokens)

    def decode(self, tokens: Tensor) -> list[str]:
        """The text of each row up to its end token, or all of it if there is none; padding is left out.

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
        text = " ".join(self.vocab[token] for token in tokens if token != self.pad_token)
        return _BEFORE_PUNCTUATION.sub("", text)
