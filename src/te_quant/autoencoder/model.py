"""A convolutional autoencoder around a vector quantizer: the VQGAN family.

Shape letters: B batch, I image channels, H W pixels, s stride, L downsamplings, C code size, h = H/s and
w = W/s token grid.

Source: Shin et al. 2021, arXiv:2112.00384; Esser et al. 2021, arXiv:2012.09841.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from te_quant import _pretrained
from te_quant._checks import require, require_integer_tensor, require_rank, require_type
from te_quant._execution import require_whole
from te_quant._pretrained import Report
from te_quant._values import require_in_range
from te_quant.autoencoder.card import autoencoder_card
from te_quant.autoencoder.coders import Level, build_decoder, build_encoder
from te_quant.autoencoder.config import AutoencoderConfig, description, stored_quantizer, with_present_quantizer
from te_quant.contract import Encoding, EquivarianceContract
from te_quant.filters import in_format_of
from te_quant.quantizers import QUANTIZERS, Quantizer, VectorQuantizer

__all__ = [
    "AutoencoderConfig",
    "AutoencoderOutput",
    "Encoding",
    "EquivarianceContract",
    "VQAutoencoder",
    "build_decoder",
    "build_encoder",
]


class AutoencoderOutput(NamedTuple):
    """What one pass computed; the same fields in training and in evaluation.

    Attributes:
        reconstruction: (B, I, H, W), what the decoder makes of ``quantized``.
        quantized: (B, C, h, w), the codes, with a gradient path to the latents.
        indices: (B, h, w) int64, the tokens; (B, h, w, Q) of a quantizer with Q codebooks.
        loss: (), of the quantizer alone: the sum of the three terms below. Add your reconstruction loss.
        codebook_loss: (), weighted.
        commitment_loss: (), weighted.
        regularization_loss: (), weighted.
        codes: (B, C, h, w), the codes without gradient; ``decode(codes, phases)`` is
            ``decode_indices(indices, phases)``.
        latents: (B, C, h, w), what the encoder made of the images.
        phases: (B, L, 2) int64, where each downsampling sampled; zeros for kinds that do not choose.
    """

    reconstruction: Tensor
    quantized: Tensor
    indices: Tensor
    loss: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor
    regularization_loss: Tensor
    codes: Tensor
    latents: Tensor
    phases: Tensor


class VQAutoencoder(nn.Module):
    """Encoder, vector quantizer and decoder.

    Tokens alone do not fix the position of the pixels below the stride where the encoder chooses a phase
    (``downsample="polyphase"``): :meth:`encode_with_phases` gives the phases, and the decoding methods take
    them. Without them they decode to the canonical position, phases of zero. Every other encoder has only that.

    Args:
        config: every option.
        quantizer: used instead of the one that ``config`` describes: any :class:`~te_quant.Quantizer` for latents
            (B, C, h, w). What ``config`` says of the quantizer beyond its defaults must be what this one has.

    Shape:
        images: (B, I, H, W) floating point in [-1, 1], sides divisible by ``config.divisor``
            (:func:`~te_quant.autoencoder.pad_to_divisor`).
        indices: (B, h, w) int64 in [0, K); (B, h, w, Q) of a quantizer with Q codebooks.

    Raises:
        ValueError: images have another rank, number of channels or sides; the quantizer does not fit the config.
        TypeError: images are not floating point, or of another dtype than the weights outside autocast; or the
            quantizer is no quantizer.
        RuntimeError: FSDP2 has sharded the weights, and a method other than ``forward`` is called without
            ``torch.distributed.fsdp.register_fsdp_forward_method``.

    Source: Shin et al. 2021, arXiv:2112.00384, stage 1.

    Example:
        >>> from te_quant import AutoencoderConfig, VQAutoencoder
        >>> quantizer = {"name": "FSQ", "levels": [8, 5, 5]}
        >>> config = AutoencoderConfig(base_channels=8, norm_groups=4, quantizer=quantizer)
        >>> model = VQAutoencoder(config)
        >>> output = model(torch.rand(2, 3, 32, 32) * 2 - 1)
        >>> output.reconstruction.shape, output.indices.shape
        (torch.Size([2, 3, 32, 32]), torch.Size([2, 8, 8]))
        >>> tokens = model.eval().encode_to_indices(torch.zeros(1, 3, 32, 32))
        >>> model.decode_indices(tokens).shape
        torch.Size([1, 3, 32, 32])
    """

    def __init__(self, config: AutoencoderConfig, *, quantizer: Quantizer | None = None) -> None:
        super().__init__()
        require_type("config", config, AutoencoderConfig, "an AutoencoderConfig")
        if quantizer is not None:
            config = _fitting(config, quantizer)
        self.config = config
        self.encoder = build_encoder(config)
        self.quantizer: Quantizer = config.build_quantizer() if quantizer is None else quantizer
        self.decoder = build_decoder(config)

    if TYPE_CHECKING:
        # torch types it as returning Any.
        def __call__(self, images: Tensor, *, generator: torch.Generator | None = None) -> AutoencoderOutput:
            """Run :meth:`forward` and the hooks."""

    def forward(self, images: Tensor, *, generator: torch.Generator | None = None) -> AutoencoderOutput:
        """Encode, quantize and decode.

        Args:
            images: see the class.
            generator: randomness of what the quantizer draws in training; the global one if None.
        """
        latents, phases = self.encode_with_phases(images)
        output = self.quantizer(latents, generator=generator)
        return AutoencoderOutput(
            reconstruction=in_format_of(images, self.decoder(output.quantized, phases)),
            latents=latents,
            phases=phases,
            **output._asdict(),
        )

    @property
    def equivariance(self) -> EquivarianceContract:
        """For which shifts of the images the tokens follow."""
        return self.encoder.equivariance

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether blocks of encoder and decoder are computed again in the backward pass, which saves memory.

        Set it to True before training. Every residual and attention block then keeps only its input. The gradients
        are the same bits, and a training step takes about a third longer. The switch belongs to this object, not
        to the config or a checkpoint. Libraries that look for modules with this attribute, such as transformers,
        find it.

        Example:
            >>> model = VQAutoencoder(AutoencoderConfig(base_channels=8, norm_groups=4, code_dim=4))
            >>> model.gradient_checkpointing = True
        """
        return all(level.gradient_checkpointing for level in self._levels())

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        require_type("gradient_checkpointing", enabled, bool, "a bool")
        for level in self._levels():
            level.gradient_checkpointing = enabled

    def _levels(self) -> list[Level]:
        return [
            module
            for coder in (self.encoder, self.decoder)
            for module in coder.modules()
            if isinstance(module, Level)
        ]

    def encode(self, images: Tensor) -> Tensor:
        """(B, I, H, W) images to (B, C, h, w) latents, before quantization."""
        _require_whole(self.encoder)
        latents: Tensor = self.encoder(images)
        return latents

    def encode_with_phases(self, images: Tensor) -> Encoding:
        """(B, I, H, W) images to (B, C, h, w) latents and (B, L, 2) phases."""
        _require_whole(self.encoder)
        # Not by with_phases, which would pass by whatever wraps the encoder.
        encoding: Encoding = self.encoder(images, return_phases=True)
        return encoding

    def decode(self, codes: Tensor, phases: Tensor | None = None) -> Tensor:
        """(B, C, h, w) codes to (B, I, H, W) images, at the position that (B, L, 2) phases give.

        Raises:
            ValueError: codes or phases have another shape, or a phase is one that this decoder cannot place: not
                0 or 1 where the upsampling takes a phase, not 0 where it does not.
            TypeError: codes are not floating point, or of another dtype than the weights outside autocast; or
                phases are not integers.
        """
        if phases is not None:
            require_rank("phases", phases, (3,), f"(B, {len(self.config.widths) - 1}, 2)")
            require_integer_tensor("phases", phases)
            stop = 2 if self.decoder.adaptive else 1
            phases = require_in_range("phases", phases, stop, "number of phases of the decoder")
        _require_whole(self.decoder)
        return in_format_of(codes, self.decoder(codes, phases))

    @torch.no_grad()
    def encode_to_indices(self, images: Tensor) -> Tensor:
        """(B, I, H, W) images to (B, h, w[, Q]) int64 tokens: no losses, no gradient, no update of any state."""
        return self.quantizer.encode(self.encode(images))

    def decode_indices(self, indices: Tensor, phases: Tensor | None = None) -> Tensor:
        """(B, h, w[, Q]) tokens to (B, I, H, W) images; differentiable in the codebook and the decoder.

        The decoder gets zeros where an index is -1, as for a masked token.

        Raises:
            ValueError: an index is below -1 or >= K, the indices are not a grid of the quantizer, or
                :meth:`decode` refuses the phases.
            TypeError: the indices or phases are not integers.
        """
        if self.quantizer.num_quantizers is None:
            require_rank("indices", indices, (3,), "(B, h, w)")
        else:
            require_rank("indices", indices, (4,), "(B, h, w, Q)")
        # A quantizer has its own dtype, float32 for instance between coders in half precision.
        codes = self.quantizer.decode(indices).contiguous()
        return self.decode(codes.to(self.decoder.dtype or codes.dtype), phases)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``model.safetensors`` and ``config.json`` into ``folder``, each as a whole or not at all.

        The quantizer first applies what is pending, so that the saved codebook is the latest. The config describes
        the quantizer as it is now, also where it was replaced or its options were assigned.

        Raises:
            ValueError: ``folder`` is a file; the model is on the meta device; a layer was added, was replaced by
                another one, or has other options than the config says, dropout included; the quantizer was
                replaced by one of another ``code_dim`` or ``channel_dim``, one of its options has no form in JSON,
                two weights are tied, or parametrizations or wrappers give weights other names. Compiled
                modules are saved under the names that they have without :func:`torch.compile`.
            TypeError: the quantizer was replaced by something else than a quantizer.
            ImportError: safetensors is not installed (``te_quant[hub]``).
            RuntimeError: FSDP2 has sharded the weights; the message names the cure.
        """
        config = self._present_config()
        state = self._described_state(config)
        # It writes to the tensors that the state holds.
        self.quantizer.apply_pending()
        _pretrained.save(folder, "VQAutoencoder", config.to_dict(), state)

    def _present_config(self) -> AutoencoderConfig:
        """The config with what it says of the quantizer as that is now."""
        # A compiled one is described as it was written.
        quantizer = getattr(self.quantizer, "_orig_mod", self.quantizer)
        return with_present_quantizer(self.config, _require_quantizer(quantizer))

    def _described_state(self, config: AutoencoderConfig) -> dict[str, Tensor]:
        """The tensors to be saved; refuse a model whose layers are not those of ``config``."""
        quantizer = getattr(self.quantizer, "_orig_mod", self.quantizer)
        known = all(
            QUANTIZERS.get(type(part).__name__) is type(part)
            for part in quantizer.modules()
            if isinstance(part, Quantizer)
        )
        # On the meta device building takes no memory and draws nothing.
        with torch.device("meta"):
            described = VQAutoencoder(config, quantizer=None if known else quantizer)
        expected = _stored(described)
        return _pretrained.described_state(self, _stored(self), described, expected, _options_of)

    def model_card(
        self,
        repo_id: str,
        *,
        reports: Mapping[str, Report] | None = None,
        license_name: str | None = None,
    ) -> str:
        """Return a README for the hub: how to load the model, what it is, and the tables of your measurements.

        Args:
            repo_id: ``owner/name``, for the title and the code.
            reports: title to report, such as ``{"Equivariance": measure_equivariance(...)}``. Each is written by
                its ``to_markdown()``.
            license_name: identifier of the licence as the hub knows it, such as ``"mit"``.

        Raises:
            ValueError: ``repo_id`` is not of the form ``owner/name``, or a report has no ``to_markdown``.
            TypeError: another argument is of the wrong kind.

        Example:
            >>> model = VQAutoencoder(AutoencoderConfig(base_channels=8, code_dim=4))
            >>> model.model_card("me/digits", license_name="mit").splitlines()[:3]
            ['---', 'license: mit', 'library_name: te_quant']
        """
        parameters = sum(parameter.numel() for parameter in self.parameters())
        return autoencoder_card(
            self._present_config(),
            self.equivariance,
            parameters,
            repo_id=repo_id,
            reports=reports or {},
            license_name=license_name,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        card: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload model",
    ) -> str:
        """Upload what :meth:`save_pretrained` writes, and a model card, to a repository of the hub, in one commit.

        ``model.push_to_hub(name, card=model.model_card(name, reports={"Equivariance": report}))`` uploads a card
        with tables.

        Args:
            repo_id: ``owner/name``; the repository is made if it does not exist.
            card: content of ``README.md``, which is replaced. None writes :meth:`model_card` into a repository
                that has none, and otherwise leaves it as it is.
            private: whether a new repository is private; None follows the settings of the owner.
            token: of an account that may write; None reads the one that is stored on this machine.
            revision: branch, made if it does not exist; None is the default one.
            commit_message: of the commit.

        Returns:
            The address of the commit.

        Raises:
            ValueError: ``repo_id`` is not of the form ``owner/name``.
            TypeError: it is no string.
            ImportError: safetensors or huggingface_hub is not installed (``te_quant[hub]``).
        """
        return _pretrained.push(
            repo_id,
            self.save_pretrained,
            card=card,
            default_card=lambda: self.model_card(repo_id),
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
        )

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        quantizer: Quantizer | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> VQAutoencoder:
        """Return the model that :meth:`save_pretrained` wrote, in evaluation mode.

        Nothing that a file names is ever imported: a model with a quantizer class of your own needs an instance.

        Args:
            source: a local folder, else a hub id ``owner/name``.
            quantizer: of the class and options that the file describes; its weights are replaced by those of the
                file. Needed where its class is not in :data:`te_quant.quantizers.QUANTIZERS`.
            device: where to put the model; None is the CPU.
            dtype: floating-point type to convert it to; None keeps the saved ones.
            revision: branch, tag or commit, for a hub id only.
            token: of an account that may read the repository, for a hub id only.
            cache_dir: where downloads are kept, for a hub id only.
            local_files_only: use only what has been downloaded before.

        Raises:
            FileNotFoundError: no such folder or repository, or a file is missing in it; or, offline, it was not
                downloaded before.
            ValueError: ``source`` is a file, or a file in it is damaged, of another format version, or does not
                fit the other; or the quantizer is not the one that it describes.
            ImportError: safetensors or huggingface_hub is not installed (``te_quant[hub]``).
        """

        def make_config(options: Mapping[str, Any]) -> AutoencoderConfig:
            if quantizer is None:
                return AutoencoderConfig.from_dict(options)
            return _config_around(dict(options), quantizer)

        model = _pretrained.load(
            "VQAutoencoder",
            make_config,
            lambda config: cls(config, quantizer=quantizer),
            source,
            device=device,
            dtype=dtype,
            hub=_pretrained.Hub(revision, token, cache_dir, local_files_only),
        )
        # A quantizer without tensors cannot learn from the file in which dtype the model was saved.
        saved = model.encoder.dtype if model.quantizer.reference is None else model.quantizer.reference.dtype
        for part in model.quantizer.modules():
            if isinstance(part, Quantizer) and part.reference is None:
                part.to(dtype=saved)
        return model


def _require_whole(part: nn.Module) -> None:
    """Refuse a part whose weights FSDP2 has sharded and will not put together when the part runs."""
    # Only a DTensor has this method; importing its class here would slow down everybody's first forward pass.
    # Copies of DataParallel and parts of FSDP1 hold their weights as plain tensors, and list no parameters.
    if not hasattr(next(part.parameters(), None), "full_tensor"):
        return
    require_whole(_own_parameters(part), "autoencoder", "autoencoder", "encode_to_indices")


def _own_parameters(part: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of ``part`` without those of submodules that gather their own weights when they run."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(part, FSDPModule):
        return
    yield from part.parameters(recurse=False)
    for child in part.children():
        yield from _own_parameters(child)


def _fitting(config: AutoencoderConfig, quantizer: object) -> AutoencoderConfig:
    """Return ``config`` describing ``quantizer``; refuse what is no quantizer for the latents of ``config``."""
    return config.describing(_require_quantizer(quantizer))


def _require_quantizer(quantizer: object) -> Quantizer:
    if not isinstance(quantizer, Quantizer):
        raise TypeError(f"quantizer must be a te_quant.Quantizer, got {type(quantizer).__name__}.")
    return quantizer


def _stored(model: VQAutoencoder) -> dict[str, Tensor]:
    """Return the state of ``model`` without the revival buffers of quantizers whose ``revival_threshold`` is 0."""
    state: dict[str, Tensor] = model.state_dict()
    for prefix, part in model.named_modules():
        if isinstance(part, VectorQuantizer) and not part.revival_threshold:
            for name in ("pending_rows", "revivals"):
                state.pop(f"{prefix}.{name}", None)
    return state


def _options_of(layer: nn.Module) -> str:
    """Say with which options a layer was built; of a quantizer as a file says it."""
    return str(description(layer)) if isinstance(layer, Quantizer) else layer.extra_repr()


def _config_around(options: dict[str, Any], quantizer: Quantizer) -> AutoencoderConfig:
    """Return the config that a file holds for a model with ``quantizer``, which must be the one it describes."""
    described = description(quantizer)
    if "quantizer" in options:
        saved = stored_quantizer(options)
        del options["quantizer"]
    else:
        saved = description(AutoencoderConfig.from_dict(options).build_quantizer())
    require(saved == described, "quantizer", f"the one that the file describes, {saved}", described)
    return AutoencoderConfig.from_dict(options)
