"""One optimizer step of Stage 2, and the state that decides the next one.

Shape letters: B batch, L caption tokens, M tokens of an image, h w token grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from examples.te_vqgan.data.caption_tokens import CaptionTokenizer
from examples.te_vqgan.runs import distributed
from examples.te_vqgan.runs.checkpoint import adam_state, load_adam_state, under
from examples.te_vqgan.runs.checks import require
from examples.te_vqgan.stage2.dalle import DalleConfig
from examples.te_vqgan.stage2.image_tokens import PHASE, sequence_order
from examples.te_vqgan.stage2.settings import DIRECTIONS, Stage2Settings
from examples.te_vqgan.stage2.transformers import Transformer, TransformerConfig, build_transformer
from te_quant import GPTConfig, Segment
from te_quant.gpt import with_present_names

__all__ = ["Stage2Trainer", "gpt_config"]

_IGNORED = -100
_BETA1 = 0.9


def gpt_config(
    settings: Stage2Settings, tokenizer: CaptionTokenizer, num_codes: int, grid: tuple[int, int], phases: int = 0
) -> TransformerConfig:
    """Return the transformer of a run: learned text positions, fixed 2-D sinusoidal image positions.

    Args:
        settings: of the run.
        tokenizer: of the captions.
        num_codes: of the image tokenizer.
        grid: h, w of its tokens.
        phases: of which the image tokenizer chooses one for each image; 0 if it does not.

    Raises:
        ValueError: the authors' transformer is to read captions without a start token, or phases.
    """
    if settings.architecture == "dalle":
        require(not phases, "phases", "0 for architecture='dalle'", phases)
        if tokenizer.start_token is None:
            raise ValueError(
                "tokenizer must be of captions in the style 'numerals', got one without a start token."
            )
        return DalleConfig(
            vocab_size=tokenizer.vocab_size,
            text_length=tokenizer.length,
            pad_token=tokenizer.pad_token,
            start_token=tokenizer.start_token,
            num_codes=num_codes,
            grid=grid,
            width=settings.width,
            depth=settings.depth,
            num_heads=settings.num_heads,
            head_width=settings.head_width or settings.width // settings.num_heads,
        )
    text = Segment("text", tokenizer.vocab_size, (tokenizer.length,), "learned", pad_token=tokenizer.pad_token)
    image = Segment("image", num_codes, grid, "sinusoidal")
    phase = (Segment(PHASE, phases, (1,), "learned"),) if phases else ()
    return GPTConfig(
        segments=(text, *phase, image),
        width=settings.width,
        depth=settings.depth,
        num_heads=settings.num_heads,
        dropout=settings.dropout,
    )


class Stage2Trainer:
    """A transformer with what trains it.

    Args:
        settings: decide, with the pairs, every number.
        config: of the transformer, as :func:`gpt_config` makes it.
        device: where to train.
        compiled: run what :func:`torch.compile` makes of the losses.

    The initial weights depend on ``settings.seed`` alone: they are drawn on the CPU from a generator state that
    is put back afterwards. Several processes keep the same weights, as :mod:`~.runs.distributed` says.
    """

    def __init__(
        self, settings: Stage2Settings, config: TransformerConfig, device: torch.device, *, compiled: bool = False
    ) -> None:
        self.settings = settings
        self.device = device
        self.step = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = build_transformer(config).to(device)
        self._losses = torch.compile(self.model.losses) if compiled else self.model.losses
        text = config.segments[0]
        # None pads nothing, and no token is -1.
        self._pad = -1 if text.pad_token is None else text.pad_token
        self.optimizers = _optimizers(settings, self.model)

    def initialize(self) -> None:
        """Prepare the very first step: seed torch, for dropout."""
        torch.manual_seed(self.settings.seed)

    def losses(self, text: Tensor, image: Tensor, direction: str) -> dict[str, Tensor]:
        """Return the mean cross entropy of text and image in nats per token; padding does not count.

        Shape:
            text: (B, L). image: (B, M), or (B, h, w) without a phase. Both int64.
        """
        parts = {"text": text.to(self.device), "image": image.flatten(1).to(self.device)}
        order: tuple[str, ...] = DIRECTIONS[direction]
        tokens = torch.cat([parts[name] for name in order], 1)
        parts["text"] = torch.where(parts["text"] == self._pad, _IGNORED, parts["text"])
        targets = torch.cat([parts[name] for name in order], 1)
        order = sequence_order(direction, self.model.config.segments)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16):
            losses = self._losses(tokens, order=order, targets=targets, ignore_index=_IGNORED)
        if PHASE in losses:
            cells = parts["image"].shape[1] - 1
            losses["image"] = (losses.pop(PHASE) + cells * losses["image"]) / (1 + cells)
        return losses

    def train_step(self, text: Tensor, image: Tensor) -> dict[str, Tensor]:
        """Take one step and return the numbers of it, each ().

        Shape:
            text: (B, L). image: (B, M). Both int64, this process's share of the batch.
        """
        settings = self.settings
        distributed.seed_step(settings.seed, self.step)
        direction = settings.direction(self.step)
        self.model.train()
        losses = self.losses(text, image, direction)
        if distributed.size() > 1:
            # Captions differ in length: not the mean of the processes' means, but that over all their tokens.
            tokens = (text != self._pad).sum().cpu()
            if isinstance(self.model.config, DalleConfig) and DIRECTIONS[direction][0] == "text":
                tokens -= len(text)  # It does not predict the first token of a sequence.
            share = tokens * distributed.size() / distributed.total(tokens.clone())
            losses["text"] = losses["text"] * share.item()
        condition, target = (losses[name] for name in DIRECTIONS[direction])
        loss = (condition + settings.target_weight * target) / (1.0 + settings.target_weight)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        distributed.average_gradients(self.model.parameters())
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm or float("inf"))
        factor = settings.rate_factor(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
        self.step += 1
        numbers = {"loss": loss, f"{direction}_loss": target, "grad_norm": norm}
        return {name: value.detach() for name, value in numbers.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that the next step depends on, by name."""
        state = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for number, optimizer in enumerate(self.optimizers):
            moments = adam_state(optimizer, self.model.named_parameters())
            state |= {f"optimizer{number}.{name}": tensor for name, tensor in moments.items()}
        state["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            state["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Continue from what :meth:`tensors` gave and from the step in ``facts``."""
        # A run may have been started by an older version of the library.
        tensors = with_present_names(tensors)
        self.model.load_state_dict(under("model", tensors))
        for number, optimizer in enumerate(self.optimizers):
            load_adam_state(optimizer, self.model.named_parameters(), under(f"optimizer{number}", tensors))
        torch.set_rng_state(tensors["rng.cpu"])
        if self.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        self.step = facts["step"]


def _optimizers(settings: Stage2Settings, model: Transformer) -> list[torch.optim.Optimizer]:
    """Adam for everything, or Muon for the blocks' matrices and Adam for embeddings, norms and biases."""
    parameters = dict(model.named_parameters())
    matrices: list[nn.Parameter] = []
    if settings.optimizer == "muon":
        matrices = [value for name, value in parameters.items() if name.startswith("blocks.") and value.ndim == 2]
    held = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in parameters.values() if id(parameter) not in held]
    rate = settings.learning_rate
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Adam([{"params": others, "peak": rate}], rate, betas=(_BETA1, settings.adam_beta2), fused=True)
    ]
    if matrices:
        rate = settings.muon_learning_rate
        optimizers.append(torch.optim.Muon([{"params": matrices, "peak": rate}], rate, weight_decay=0.0))
    return optimizers
