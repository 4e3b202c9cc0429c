"""The description of an autoencoder that a checkpoint stores."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any

import torch

from te_quant._checks import plain, plain_fields, require, require_choice, require_int, require_number
from te_quant.filters import PADDING_MODES, PaddingMode
from te_quant.layers.activation import ACTIVATIONS, Activation
from te_quant.layers.downsample import DOWNSAMPLERS, Downsample
from te_quant.layers.norm import NORMS, Norm
from te_quant.layers.upsample import UPSAMPLERS, Upsample
from te_quant.quantizers import LFQ, QUANTIZERS, Quantizer, ResidualVectorQuantizer, VectorQuantizer
from te_quant.quantizers._losses import GradientEstimator
from te_quant.quantizers.lfq import MAX_CODE_DIM
from te_quant.quantizers.vector import CodebookUpdate, Metric

__all__ = ["AutoencoderConfig"]

# Of every GroupNorm in the paper's configuration.
_GROUPS = 32
_WIDTH = 128
_MULTIPLIERS = (1, 2, 2)
# What these options of ResidualVectorQuantizer were by default when files left defaults out.
_FORMER_DEFAULTS: Mapping[str, Any] = {"codebook_update": "gradient", "commitment_weight": 0.25, "decay": 0.99}
_SEQUENCES = ("channel_multipliers", "widths", "decoder_widths", "attention_levels")


# A default that depends on other options keeps its class, so that `dataclasses.replace` adapts it again. It equals
# the same value given by the caller.
class _DefaultLevels(tuple[int, ...]):
    """Attention levels that the caller did not choose: the coarsest one."""


class _DefaultWidths(tuple[int, ...]):
    """Multipliers or widths that the caller did not choose: 1-2-2, or those that follow from the others."""


class _DefaultChannels(int):
    """A base width that the caller did not choose: 128, or the first of the widths."""


class _DefaultGroups(int):
    """Norm groups that the caller did not choose: 32, or the largest power of two that divides the width."""


@dataclass(frozen=True)
class AutoencoderConfig:
    """Every option of a :class:`~te_quant.autoencoder.VQAutoencoder`.

    The networks are by default those of the paper's stage 1, the quantizer is that of
    :class:`~te_quant.VectorQuantizer`.

    Example:
        >>> config = AutoencoderConfig(base_channels=16, channel_multipliers=(1, 2))
        >>> config.stride, config.attention_levels, config.norm_groups
        (2, (1,), 16)
        >>> AutoencoderConfig.from_dict(config.to_dict()) == config
        True

    Args:
        image_channels: channels of the images, at least 1.
        base_channels: width of the encoder's first convolution; a multiple of ``norm_groups`` for
            ``norm="group"``, at least 2 for ``norm="channel"``. By default 128, or the first of ``widths``.
        channel_multipliers: width of each level divided by ``base_channels``, finest level first. Each level but
            the last halves the sides: L levels make a stride of 2^(L-1) pixels. By default 1-2-2; empty if
            ``widths`` are given.
        widths: width of each level, finest first, instead of ``channel_multipliers``: ``widths=(96, 128)``. By
            default ``base_channels`` times each multiplier.
        decoder_widths: the same for the decoder, where it differs, also finest first; as many as the encoder has.
            By default those of the encoder.
        num_res_blocks: residual blocks per level of the encoder, at least 1; the decoder has one more per level.
        attention_levels: the levels, counted from 0 (finest), whose residual blocks are each followed by
            attention; by default the coarsest.
        middle_attention: whether the middle of encoder and decoder, behind the coarsest level, has attention.
            ``None`` is yes if any level has.
        downsample: a name in :data:`te_quant.layers.DOWNSAMPLERS`, to which you can add your own layer.
            ``polyphase`` (with circular padding) makes tokens exact for every integer shift; ``fourier`` needs
            circular padding.
        upsample: a name in :data:`te_quant.layers.UPSAMPLERS`. ``polyphase`` and ``downsample="polyphase"``
            require each other, as no other decoder puts the pixels back where they were; ``fourier`` needs
            circular padding.
        encoder_padding: padding mode of every layer before the quantizer.
        decoder_padding: padding mode of every layer behind the quantizer.
        norm: ``group`` (statistics of the image) or ``channel`` (of each pixel); see
            :func:`~te_quant.layers.build_norm`.
        norm_groups: groups of every GroupNorm, at least 1; by default 32, or the largest power of two below that
            divides ``base_channels``. Without effect for ``norm="channel"``.
        activation: ``silu``, or ``filtered`` or ``polynomial``, which need circular padding everywhere; see
            :func:`~te_quant.layers.build_activation`. Circular ``fourier`` downsampling, ``polynomial``,
            GroupNorm and no attention together make latents follow every integer shift of the image exactly, as
            :func:`te_quant.shifts.fourier_shift` does; tokens then follow multiples of the stride.
        dropout: in the residual blocks, in [0, 1).
        num_codes: K, at least 1.
        code_dim: C, at least 1: size of a latent vector and of a code.
        z_channels: channels of the encoder's last and the decoder's first 3x3 convolution, at least 1; a 1x1
            convolution on each side of the quantizer maps them to C and back. ``None`` is C.
        metric: see :class:`~te_quant.VectorQuantizer`, as all below.
        codebook_update: ``ema``, or ``gradient`` as in the paper.
        commitment_weight: β, >= 0; 0.25 in the paper.
        decay: of the moving averages, in [0, 1).
        revival_threshold: below which fraction of the average usage a code is dead, in [0, 1).
        orthogonal_reg: λ of the orthogonality penalty, >= 0; 10 for TE-VQGAN.
        gradient_estimator: ``straight_through`` or ``rotation_trick``.
        quantizer: another quantizer than the :class:`~te_quant.VectorQuantizer` that the fields above describe:
            ``{"name": ..., option: value, ...}`` with a name in :data:`te_quant.quantizers.QUANTIZERS`. Where its
            constructor wants ``num_codes`` or ``code_dim`` and they are not named, those of the fields are used.
            Quantizers inside are described in the same way, completely: ``"stages": [{"name": ...}, ...]``.
            The fields above then show what the quantizer has; one that says something else beyond its default is
            refused. A field at its default counts as left out, so the quantizer's own options decide.
        attention: ``False`` builds a model without attention, like ``attention_levels=()``; together with levels
            or a ``middle_attention`` that contradict it, it is refused. It is not stored itself.

    Raises:
        ValueError: an option is out of range, ``norm_groups`` does not divide ``base_channels``, or two options
            contradict each other. The message names an option that was given, never a default.
        TypeError: an option has the wrong type.

    Source: Shin et al. 2021, arXiv:2112.00384, and its published configuration (width 128, multipliers
        1-2-2, one residual block, attention at stride 4, 256-d codes). Differs: 256 codes, not 128, since
        the paper's Table 3 counts 252 used ones.
    """

    image_channels: int = 3
    base_channels: int = _DefaultChannels(_WIDTH)
    channel_multipliers: tuple[int, ...] = _DefaultWidths(_MULTIPLIERS)
    widths: tuple[int, ...] = dataclasses.field(default=_DefaultWidths(), kw_only=True)
    decoder_widths: tuple[int, ...] = dataclasses.field(default=_DefaultWidths(), kw_only=True)
    num_res_blocks: int = 1
    attention_levels: tuple[int, ...] = _DefaultLevels()
    middle_attention: bool | None = dataclasses.field(default=None, kw_only=True)
    downsample: Downsample | str = "strided_conv"
    upsample: Upsample | str = "nearest"
    encoder_padding: PaddingMode = "replicate"
    decoder_padding: PaddingMode = "zeros"
    norm: Norm = "group"
    norm_groups: int = _DefaultGroups(32)
    activation: Activation = "silu"
    dropout: float = 0.0
    num_codes: int = 256
    code_dim: int = 256
    z_channels: int | None = dataclasses.field(default=None, kw_only=True)
    metric: Metric = "l2"
    codebook_update: CodebookUpdate = "ema"
    commitment_weight: float = 1.0
    decay: float = 0.9
    revival_threshold: float = 0.01
    orthogonal_reg: float = 0.0
    gradient_estimator: GradientEstimator = "straight_through"
    quantizer: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)
    attention: InitVar[bool | None] = None

    def __post_init__(self, attention: bool | None) -> None:
        plain_fields(self)
        for name in _SEQUENCES:
            # A list, as JSON gives it, would make the config unhashable and unequal to its own copy.
            object.__setattr__(self, name, _tuple_of_ints(name, getattr(self, name)))
        self._adapt_defaults()
        self._resolve_attention(attention)
        self._check_networks()
        self._check_combinations()
        self._check_levels()
        self._check_quantizer()

    def _adapt_defaults(self) -> None:
        """Fit the options that the caller did not choose to the ones that they depend on."""
        self._resolve_widths()
        if isinstance(self.attention_levels, _DefaultLevels):
            object.__setattr__(self, "attention_levels", _DefaultLevels((len(self.widths) - 1,)))
        if isinstance(self.norm_groups, _DefaultGroups):
            # Groups do not matter to another norm, whose stored configs say 32.
            every = (self.base_channels, *self.widths, *self.decoder_widths)
            groups = math.gcd(_GROUPS, *every) if self.norm == "group" else _GROUPS
            object.__setattr__(self, "norm_groups", _DefaultGroups(groups))

    def _resolve_widths(self) -> None:
        """Fill in those of the four options for widths that the caller did not choose."""
        given = not isinstance(self.widths, _DefaultWidths)
        if given:
            _require_each("widths", self.widths)
            chosen = isinstance(self.channel_multipliers, _DefaultWidths)
            expected = f"left out with widths={self.widths}"
            require(chosen, "channel_multipliers", expected, self.channel_multipliers)
            object.__setattr__(self, "channel_multipliers", _DefaultWidths())
        elif isinstance(self.channel_multipliers, _DefaultWidths):
            object.__setattr__(self, "channel_multipliers", _DefaultWidths(_MULTIPLIERS))
        if isinstance(self.base_channels, _DefaultChannels):
            object.__setattr__(self, "base_channels", _DefaultChannels(self.widths[0] if given else _WIDTH))
        require_int("base_channels", self.base_channels, 1)
        if not given:
            _require_each("channel_multipliers", self.channel_multipliers)
            widths = (self.base_channels * multiplier for multiplier in self.channel_multipliers)
            object.__setattr__(self, "widths", _DefaultWidths(widths))
        if isinstance(self.decoder_widths, _DefaultWidths):
            object.__setattr__(self, "decoder_widths", _DefaultWidths(self.widths))
        _require_each("decoder_widths", self.decoder_widths)
        same = len(self.decoder_widths) == len(self.widths)
        require(same, "decoder_widths", f"{len(self.widths)} ints, one per level", self.decoder_widths)

    def _resolve_attention(self, attention: bool | None) -> None:
        if attention is None:
            return
        if not isinstance(attention, bool):
            raise TypeError(f"attention must be True, False or None, got {attention!r}.")
        if not attention and isinstance(self.attention_levels, _DefaultLevels):
            object.__setattr__(self, "attention_levels", ())
        contradicted = [f"attention_levels={self.attention_levels}"]
        if self.middle_attention is not None:
            contradicted.append(f"middle_attention={self.middle_attention}")
        found = bool(self.attention_levels) or self.has_middle_attention
        expected = f"{not attention} or None with {' and '.join(contradicted)}"
        require(found == attention, "attention", expected, attention)

    def _check_networks(self) -> None:
        if self.middle_attention is not None and not isinstance(self.middle_attention, bool):
            raise TypeError(f"middle_attention must be True, False or None, got {self.middle_attention!r}.")
        if self.z_channels is not None:
            require_int("z_channels", self.z_channels, 1)
        for name in ("image_channels", "num_res_blocks", "norm_groups"):
            require_int(name, getattr(self, name), 1)
        require_choice("norm", self.norm, NORMS)
        # Widths that follow from base_channels are multiples of it.
        every: dict[str, int | tuple[int, ...]] = {"base_channels": self.base_channels}
        if not isinstance(self.widths, _DefaultWidths) and isinstance(self.base_channels, _DefaultChannels):
            every = {}
        every |= {"widths": self.widths, "decoder_widths": self.decoder_widths}
        for name, value in every.items():
            widths = value if isinstance(value, tuple) else (value,)
            if self.norm == "group":
                divides = all(width % self.norm_groups == 0 for width in widths)
                require(divides, "norm_groups", f"a divisor of {name}={value}", self.norm_groups)
            else:
                require(min(widths) > 1, name, "at least 2 for norm='channel'", value)
        require_choice("downsample", self.downsample, DOWNSAMPLERS)
        require_choice("upsample", self.upsample, UPSAMPLERS)
        require_choice("encoder_padding", self.encoder_padding, PADDING_MODES)
        require_choice("decoder_padding", self.decoder_padding, PADDING_MODES)
        require_choice("activation", self.activation, ACTIVATIONS)
        require_number("dropout", self.dropout, 0, below=1)

    def _check_combinations(self) -> None:
        # The default layers are neither adaptive nor periodic, so an option blamed here is one that was given.
        down, up = DOWNSAMPLERS[self.downsample], UPSAMPLERS[self.upsample]
        adaptive = {"downsample": getattr(down, "adaptive", False), "upsample": getattr(up, "adaptive", False)}
        for name, other in (("downsample", "upsample"), ("upsample", "downsample")):
            expected = f"used with an adaptive {other} such as 'polyphase'"
            got = f"{getattr(self, name)!r} with {other}={getattr(self, other)!r}"
            require(adaptive[other] or not adaptive[name], name, expected, got)
        # These transform the whole image as one period: any other padding would contradict them.
        for option, name, layer in (("encoder_padding", "downsample", down), ("decoder_padding", "upsample", up)):
            mode = getattr(self, option)
            expected = f"used with {option}='circular'"
            for demanding, demands in (
                (name, getattr(layer, "periodic", False)),
                ("activation", self.activation != "silu"),
            ):
                got = f"{getattr(self, demanding)!r} with {option}={mode!r}"
                require(mode == "circular" or not demands, demanding, expected, got)

    def _check_levels(self) -> None:
        attention = self.attention_levels
        for level in attention:
            require_int("attention_levels entry", level, 0, len(self.widths) - 1)
        require(len(set(attention)) == len(attention), "attention_levels", "without repetition", attention)

    def _check_quantizer(self) -> None:
        # On the meta device: only the options are looked at, and no memory or randomness is used.
        with torch.device("meta"):
            if self.quantizer is None:
                self.build_quantizer()
                return
            options = _as_json(self.quantizer)
            kind = _quantizer_class(options.pop("name", None))
            parameters = inspect.signature(kind).parameters
            if "stages" not in options:
                missing = [
                    name for name in ("num_codes", "code_dim") if name in parameters and name not in options
                ]
                options |= {name: getattr(self, name) for name in missing}
                if kind is LFQ and "code_dim" in missing:
                    _require_few_bits(self.code_dim)
            self._adopt(_build(kind, options), "config.quantizer")

    def _adopt(self, quantizer: Quantizer, owner: str) -> None:
        """Take over what ``quantizer`` has, unless a field says something else beyond its default."""
        title, axis = type(quantizer).__name__, quantizer.channel_dim
        require(axis == 1, "quantizer.channel_dim", "1, as latents are (B, C, h, w)", f"{axis} ({title})")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in quantizer_fields():
            value, default, own = getattr(self, name), defaults[name], getattr(quantizer, name, None)
            if value not in (default, own):
                expected = f"its default {default!r}, or what {owner} has ({own!r}, {title})"
                require(False, f"config.{name}", expected, repr(value))
            if own is not None:
                object.__setattr__(self, name, own)
        described = description(quantizer)
        plain = type(quantizer) is VectorQuantizer and set(described) <= {"name", *quantizer_fields()}
        object.__setattr__(self, "quantizer", None if plain else described)

    def build_quantizer(self) -> Quantizer:
        """Build the quantizer that this config describes, from the global random state."""
        if self.quantizer is None:
            return VectorQuantizer(**{name: getattr(self, name) for name in quantizer_fields()})
        options = dict(self.quantizer)
        return _build(_quantizer_class(options.pop("name")), options)

    def describing(self, quantizer: Quantizer) -> AutoencoderConfig:
        """Return this config with what it says of the quantizer taken from ``quantizer``.

        A class that is not in :data:`te_quant.quantizers.QUANTIZERS` is named too: only models that are given an
        instance of it can be built from that config.

        Raises:
            ValueError: a field says something else beyond its default.
        """
        if self.quantizer is not None:
            described = description(quantizer)
            require(self.quantizer == described, "quantizer", f"the config's {self.quantizer}", described)
        config = copy.copy(self)
        config._adopt(quantizer, "the given quantizer")
        return config

    @property
    def stride(self) -> int:
        """Pixels from one token to the next."""
        return int(2 ** (len(self.widths) - 1))

    @property
    def divisor(self) -> int:
        """What the sides of an image must be divisible by."""
        return self.stride

    @property
    def has_middle_attention(self) -> bool:
        """Whether the middle of encoder and decoder has attention."""
        return bool(self.attention_levels) if self.middle_attention is None else self.middle_attention

    def to_dict(self) -> dict[str, Any]:
        """Return all options as JSON values: ``from_dict(json.loads(json.dumps(c.to_dict()))) == c``."""
        options = dataclasses.asdict(self)
        options |= {"base_channels": int(self.base_channels), "norm_groups": int(self.norm_groups)}
        # Options that are left at their defaults stay out, as in files from before they existed.
        absent = [name for name in ("quantizer", "middle_attention", "z_channels") if options[name] is None]
        for name in ("widths", "decoder_widths"):
            absent += [name] if isinstance(getattr(self, name), _DefaultWidths) else []
        if not self.channel_multipliers:
            absent.append("channel_multipliers")
        for name in absent:
            del options[name]
        return {name: list(value) if name in _SEQUENCES else value for name, value in options.items()}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> AutoencoderConfig:
        """Return the config with these options; the others keep their defaults.

        Raises:
            ValueError: an option does not exist, or is out of range.
            TypeError: an option has the wrong type.
        """
        known = [field.name for field in dataclasses.fields(cls)] + ["attention"]
        for name in options:
            require(name in known, "config key", "one of " + ", ".join(known), repr(name))
        if "codebook_update" in options and "revival_threshold" not in options:
            # A file from before codes were revived.
            options = {**options, "revival_threshold": 0.0}
        if "quantizer" in options:
            options = {**options, "quantizer": stored_quantizer(options)}
        return cls(**options)


def _tuple_of_ints(name: str, value: object) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence of ints, got {value!r}.")
    return value if isinstance(value, _DefaultLevels | _DefaultWidths) else tuple(map(plain, value))


def _require_each(name: str, widths: Sequence[int]) -> None:
    require(len(widths) > 0, name, "at least one int", widths)
    for width in widths:
        require_int(f"{name} entry", width, 1)


def quantizer_fields() -> tuple[str, ...]:
    """Return the fields of a config that are options of :class:`~te_quant.VectorQuantizer`, by the same names."""
    options = inspect.signature(VectorQuantizer).parameters
    return tuple(field.name for field in dataclasses.fields(AutoencoderConfig) if field.name in options)


def with_present_quantizer(config: AutoencoderConfig, quantizer: Quantizer) -> AutoencoderConfig:
    """Return ``config`` with everything that it says of its quantizer read off ``quantizer``.

    Raises:
        ValueError: the networks of ``config`` do not fit the quantizer, or one of its options has no form in JSON.
    """
    code_dim = config.code_dim
    names = ("quantizer", *quantizer_fields())
    options: dict[str, Any] = {
        field.name: field.default for field in dataclasses.fields(config) if field.name in names
    }
    present = dataclasses.replace(config, **options).describing(quantizer)
    require(present.code_dim == code_dim, "quantizer.code_dim", f"{code_dim} as the config's", present.code_dim)
    # Equal options may differ in form, such as 1 and 1.0; those of the caller are kept.
    return config if present == config else present


def description(quantizer: Quantizer) -> dict[str, Any]:
    """Return the name of a quantizer's class and those of its options that are not defaults, as JSON has them.

    Options whose default has changed are always named.

    Raises:
        ValueError: an option has no form in JSON.
        TypeError: an option cannot be read off the quantizer.
    """
    parameters = inspect.signature(type(quantizer)).parameters
    changed = _FORMER_DEFAULTS if type(quantizer) is ResidualVectorQuantizer else ()
    try:
        given = quantizer.options()
    except AttributeError as error:
        raise TypeError(f"quantizer must say how it was built: {error}") from error
    options = {
        name: value for name, value in given.items() if value != parameters[name].default or name in changed
    }
    return {"name": type(quantizer).__name__, **_as_json(options)}


def stored_quantizer(options: Mapping[str, Any]) -> Any:
    """Return what the options of a stored config say of the quantizer, with the defaults of their time."""
    if set(_FORMER_DEFAULTS) <= set(options):
        # A file shows at the top what its quantizer has, but not what quantizers inside have.
        return _as_stored(options["quantizer"], {name: options[name] for name in _FORMER_DEFAULTS})
    return options["quantizer"]


def _as_stored(described: object, defaults: Mapping[str, Any]) -> Any:
    """Name the options of residual quantizers that a file left out because they were ``defaults`` then."""
    if isinstance(described, list):
        return [_as_stored(part, defaults) for part in described]
    if not isinstance(described, Mapping):
        return described
    options = {name: _as_stored(value, _FORMER_DEFAULTS) for name, value in described.items()}
    built = described.get("name") == "ResidualVectorQuantizer" and "stages" not in described
    return {**defaults, **options} if built else options


def _require_few_bits(code_dim: object) -> None:
    """Refuse more channels than LFQ has bits, as the default of a config does."""
    code_dim = require_int("code_dim", code_dim, 1)
    expected = f"at most {MAX_CODE_DIM} with the quantizer LFQ, which has 2^code_dim codes"
    require(code_dim <= MAX_CODE_DIM, "code_dim", expected, f"{code_dim}; pass code_dim=10 for 1,024 codes")


def _as_json(options: object) -> dict[str, Any]:
    if not isinstance(options, Mapping):
        raise TypeError(f"quantizer must be a mapping with a name and options, got {options!r}.")
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(options), default=_plain_value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"quantizer options must be values that JSON has, got {dict(options)!r}.") from error
    return plain


def _build(kind: type[Quantizer], options: Mapping[str, Any]) -> Quantizer:
    """Build a quantizer and those that its options describe."""
    parameters = inspect.signature(kind).parameters
    for name in options:
        known = ", ".join(parameters)
        require(name in parameters, f"{kind.__name__} option", f"one of {known}", repr(name))
    needed = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    lacking = ", ".join(name for name in needed if name not in options)
    require(not lacking, f"{kind.__name__} options", f"complete, with {lacking}", dict(options))
    return kind(**{name: _with_quantizers(value) for name, value in options.items()})


def _with_quantizers(value: object) -> Any:
    """Replace the descriptions of quantizers in the value of an option by the quantizers."""
    if isinstance(value, Mapping) and "name" in value:
        options = dict(value)
        return _build(_quantizer_class(options.pop("name")), options)
    return [_with_quantizers(item) for item in value] if isinstance(value, list) else value


def _plain_value(value: object) -> object:
    if isinstance(value, Quantizer):
        return description(value)
    number = plain(value)
    if number is value:
        raise TypeError(f"{value!r} has no form in JSON.")
    return number


def _quantizer_class(name: object) -> type[Quantizer]:
    known = ", ".join(repr(known) for known in QUANTIZERS)
    cure = "add your class to te_quant.quantizers.QUANTIZERS, or pass quantizer=<an instance>"
    require(name in QUANTIZERS, "quantizer name", f"one of {known}", f"{name!r}; {cure}")
    return QUANTIZERS[str(name)]
