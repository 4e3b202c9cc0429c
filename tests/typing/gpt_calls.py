"""What type checkers see in a call of a GPT; never run."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import assert_type

from te_quant import GPT


def calls(gpt: GPT, tokens: Tensor, generators: list[torch.Generator]) -> None:
    """Hold the types of results."""
    assert_type(gpt.generate(tokens, generator=generators), Tensor)
    assert_type(gpt.generate(tokens, generator=generators[0], return_log_prob=False), Tensor)
    assert_type(gpt.generate(tokens, top_k=3, return_log_prob=True), tuple[Tensor, Tensor])
    assert_type(gpt.log_prob(tokens), Tensor)
