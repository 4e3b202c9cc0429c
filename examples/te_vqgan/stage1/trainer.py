"""One optimizer step of Stage 1, and the state that decides the next one.

Shape letters: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config

from examples.te_vqgan.runs import distributed
from examples.te_vqgan.runs.checkpoint import adam_state, load_adam_state, under
from examples.te_vqgan.runs.schedule import rate_factor
from examples.te_vqgan.stage1.discriminator import PatchDiscriminator
from examples.te_vqgan.stage1.joint import joint_indices, num_combinations, vector_quantizer
from examples.te_vqgan.stage1.losses import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    reconstruction_loss,
)
from examples.te_vqgan.stage1.perceptual import load_perceptual
from examples.te_vqgan.stage1.presets import Stage1Settings
from examples.te_vqgan.stage1.round_trip import encode_at, growth, rounded
from examples.te_vqgan.stage1.shift_loss import START, draw_moves, roll_each, shift_loss
from examples.te_vqgan.stage1.wanted_codes import wanted_code_loss
from te_quant import Quantizer, VQAutoencoder
from te_quant.autoencoder import AutoencoderOutput
from te_quant.functional import perplexity

__all__ = ["Stage1Trainer", "autocast"]

# Both of Adam's decay rates as in VQGAN.
_BETAS = (0.5, 0.9)
# Enough latents for every code without a first batch of thousands of images.
_KMEANS_IMAGES = 256
# Of latents to their own codes. At 1 only a latent on its code has none.
_OWN_MARGIN = 0.5
# A step changes codes by so little that the iteration converges quadratically from its start.
_NEWTON_SCHULZ = 4


def autocast(settings: Stage1Settings, device: torch.device) -> torch.autocast:
    """Return the context in which encoder and decoder run."""
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16)


class Stage1Trainer:
    """An autoencoder with what trains it.

    Args:
        settings: decide, with the batches, every number.
        device: where to train.
        channels_last: keep images and convolutions in that order in memory.
        compiled: run what :func:`torch.compile` makes of the autoencoder.
        quantizer: makes one to use instead of that of ``settings.model``.

    Codebooks move at a rate of their own, whatever else a quantizer learns at that of the networks.

    The initial weights depend on ``settings.seed`` alone: they are drawn on the CPU from a generator state that
    is put back afterwards. Several processes keep the same weights, as :mod:`~.runs.distributed` says.
    """

    def __init__(
        self,
        settings: Stage1Settings,
        device: torch.device,
        *,
        channels_last: bool = False,
        compiled: bool = False,
        quantizer: Callable[[], Quantizer] | None = None,
    ) -> None:
        self.settings = settings
        self.device = device
        self.step = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            given = None if quantizer is None else quantizer()
            # Once more, so that encoders start alike whatever a quantizer draws.
            torch.manual_seed(settings.seed)
            self.model = VQAutoencoder(settings.model, quantizer=given).to(device)
            self.discriminator = PatchDiscriminator(
                settings.model.image_channels,
                settings.discriminator_channels,
                settings.discriminator_layers,
                norm=settings.discriminator_norm,
            ).to(device)
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        for module in (self.model, self.discriminator):
            module.to(memory_format=self._layout)  # type: ignore[call-overload]
        if compiled and settings.adversarial_weight > 0:
            # The adaptive weight goes back through the graph twice before the step does. By default a compiled
            # backward pass reuses the memory of its inputs, which forbids that.
            functorch_config.donated_buffer = False
        self._run = torch.compile(self.model) if compiled else self.model
        self.perceptual = load_perceptual(settings.perceptual, device)
        groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
        for name, parameter in self.model.named_parameters():
            groups[name.startswith("quantizer.") and name.endswith(".codebook")].append(parameter)
        rates = ((groups[False], 1.0), (groups[True], settings.codebook_lr_factor))
        parts = [{"params": parameters, "factor": factor} for parameters, factor in rates if parameters]
        # Fused: with some hundred small parameters a loop over them takes longer than their arithmetic.
        self.optimizer = torch.optim.Adam(parts, settings.learning_rate, betas=_BETAS, fused=True)
        self.judge_optimizer = torch.optim.Adam(
            self.discriminator.parameters(), settings.learning_rate, betas=_BETAS, fused=True
        )

    def initialize(self, batch: Callable[[int], Tensor]) -> None:
        """Prepare the very first step: seed torch, and place the codes if k-means is to do it.

        Args:
            batch: gives the images of a step, all rows, whatever the number of processes.
        """
        torch.manual_seed(self.settings.seed)
        if self.settings.orthogonal_codes:
            nn.init.orthogonal_(vector_quantizer(self.model).codebook)
        if self.settings.codebook_init != "kmeans":
            return
        count = -(-_KMEANS_IMAGES // self.settings.batch_size)
        with torch.no_grad(), autocast(self.settings, self.device):
            latents = torch.cat([self.model.encode(batch(number).to(self.device)) for number in range(count)])
        generator = torch.Generator(self.device).manual_seed(self.settings.seed)
        # The quantizer collects the latents of all processes, who have the same ones here.
        own = latents.float() if distributed.is_main() else latents[:0].float()
        vector_quantizer(self.model).kmeans_init(own, generator=generator)

    def train_step(self, images: Tensor) -> dict[str, Tensor]:
        """Take one step and return the numbers of it, each ().

        Shape:
            images: (B, C, H, W) in [-1, 1], this process's share of the batch.
        """
        settings = self.settings
        distributed.seed_step(settings.seed, self.step)
        factor = rate_factor(
            self.step,
            steps=settings.steps,
            warmup_steps=settings.warmup_steps,
            final_share=settings.final_lr_share,
        )
        self.model.train()
        images = images.to(self.device, memory_format=self._layout)
        if settings.shift_images:
            moves = draw_moves(len(images), images.shape[-1], settings.model.stride, self.device)
            images = roll_each(images, moves.pixels)
        with autocast(settings, self.device):
            output = self._run(images)
        reconstruction = output.reconstruction.float()
        rebuilt = reconstruction_loss(
            reconstruction,
            images,
            l1_weight=settings.l1_weight,
            l2_weight=settings.l2_weight,
            perceptual=self.perceptual,
            perceptual_weight=settings.perceptual_weight,
        )
        loss = rebuilt + output.loss
        numbers = {"reconstruction_loss": rebuilt, "codebook_loss": output.codebook_loss}
        numbers |= {"commitment_loss": output.commitment_loss, "orthogonal_loss": output.regularization_loss}
        share = growth(self.step, settings.steps, settings.round_trip_start)
        if settings.round_trip_weight > 0 and share > 0:
            returned, turned = self._round_trip(reconstruction, output)
            loss = loss + settings.round_trip_weight * share * (
                returned + settings.round_trip_phase_weight * turned
            )
            numbers |= {"round_trip_loss": returned, "phase_loss": turned}
        share = growth(self.step, settings.steps, START)
        if settings.shift_weight > 0 and share > 0:
            moved = self._moved(images, output)
            loss = loss + settings.shift_weight * share * moved
            numbers["shift_loss"] = moved
        if settings.margin_weight > 0:
            codebook = vector_quantizer(self.model).codebook
            near = wanted_code_loss(output.latents.float(), codebook, output.indices, margin=_OWN_MARGIN)
            loss = loss + settings.margin_weight * near
            numbers["margin_loss"] = near
        judged = settings.adversarial_weight > 0 and self.step >= settings.adversarial_start
        if judged:
            adversarial = self._adversarial(rebuilt, reconstruction)
            loss = loss + adversarial
            numbers["adversarial_loss"] = adversarial
        numbers = {"loss": loss, **numbers}
        numbers["grad_norm"] = self._descend(self.optimizer, loss, self.model, factor)
        if settings.orthogonal_codes:
            _orthogonalize(vector_quantizer(self.model).codebook)
        if judged:
            verdict = discriminator_loss(self.discriminator(images), self.discriminator(reconstruction.detach()))
            self._descend(self.judge_optimizer, verdict, self.discriminator, factor)
            numbers["discriminator_loss"] = verdict
        with torch.no_grad():
            difference = reconstruction - images
            numbers |= {"l1": difference.abs().mean(), "l2": difference.square().mean()}
            joint = joint_indices(output.indices, self.model.quantizer)
            counts = torch.bincount(joint.flatten(), minlength=num_combinations(self.model.quantizer))
            distributed.total(counts)
            numbers |= {"batch_used_codes": (counts > 0).sum(), "batch_perplexity": perplexity(counts.double())}
        numbers["learning_rate"] = torch.tensor(settings.learning_rate * factor)
        self.step += 1
        return {name: value.detach() for name, value in numbers.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that the next step depends on, by name."""
        state = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        state |= _prefixed("adam", adam_state(self.optimizer, self.model.named_parameters()))
        if self.settings.adversarial_weight > 0:
            state |= _prefixed("discriminator", self.discriminator.state_dict())
            state |= _prefixed(
                "judge_adam", adam_state(self.judge_optimizer, self.discriminator.named_parameters())
            )
        state["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            state["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Continue from what :meth:`tensors` gave and from the step in ``facts``."""
        self.model.load_state_dict(under("model", tensors))
        load_adam_state(self.optimizer, self.model.named_parameters(), under("adam", tensors))
        if self.settings.adversarial_weight > 0:
            self.discriminator.load_state_dict(under("discriminator", tensors))
            named = self.discriminator.named_parameters()
            load_adam_state(self.judge_optimizer, named, under("judge_adam", tensors))
        torch.set_rng_state(tensors["rng.cpu"])
        if self.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        self.step = facts["step"]

    def _round_trip(self, reconstruction: Tensor, output: AutoencoderOutput) -> tuple[Tensor, Tensor]:
        with autocast(self.settings, self.device):
            latents, turned = encode_at(self.model, rounded(reconstruction), output.phases)
        codebook, margin = vector_quantizer(self.model).codebook, self.settings.round_trip_margin
        return wanted_code_loss(latents.float(), codebook, output.indices, margin=margin), turned

    def _moved(self, images: Tensor, output: AutoencoderOutput) -> Tensor:
        codebook, margin = vector_quantizer(self.model).codebook, self.settings.shift_margin
        with autocast(self.settings, self.device):
            return shift_loss(self.model, images, output.indices, codebook, margin=margin)

    def _adversarial(self, rebuilt: Tensor, reconstruction: Tensor) -> Tensor:
        weight: float | Tensor = self.settings.adversarial_weight
        loss = generator_loss(self.discriminator(reconstruction))
        if self.settings.adversarial_adaptive:
            last = [parameter for parameter in self.model.decoder.parameters() if parameter.ndim == 4][-1]
            weight = weight * adaptive_weight(rebuilt, loss, last, delta=self.settings.adversarial_delta)
        return weight * loss

    def _descend(self, optimizer: torch.optim.Adam, loss: Tensor, module: nn.Module, factor: float) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * group.get("factor", 1.0) * factor
        optimizer.zero_grad(set_to_none=True)
        # The generator's loss leaves gradients in the discriminator too, hence zero_grad right before backward.
        torch.autograd.backward(loss)
        distributed.average_gradients(module.parameters())
        norm = nn.utils.clip_grad_norm_(module.parameters(), self.settings.clip_norm or float("inf"))
        optimizer.step()
        return norm


@torch.no_grad()
def _orthogonalize(codebook: Tensor) -> None:
    """Move codes to the nearest orthogonal ones of their mean length, by Newton and Schulz's iteration."""
    length = codebook.norm(dim=1).mean()
    unit = codebook / length
    for _ in range(_NEWTON_SCHULZ):
        unit = 1.5 * unit - 0.5 * unit @ (unit.T @ unit)
    codebook.copy_(length * unit)


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}
