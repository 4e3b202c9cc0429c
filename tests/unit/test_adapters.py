"""Foreign tokenizers as two functions: the same as the calls that their own code makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from te_quant import adapters, measure_equivariance
from te_quant.quantizers import LFQ


class _Encoder(nn.Module):
    """Two halvings, and the number that taming's and LlamaGen's encoders count them by."""

    num_resolutions = 3

    def __init__(self, out: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 2, stride=2), nn.Conv2d(4, out, 2, stride=2)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(images)))


class _Quantize(nn.Module):
    """Nearest codes, flat indices; the look-up of taming, or of LlamaGen, whose shape has the channels second."""

    def __init__(self, *, channels_second: bool) -> None:
        super().__init__()
        self.n_e, self.e_dim, self.channels_second = 16, 5, channels_second
        self.embedding = nn.Embedding(16, 5)
        nn.init.normal_(self.embedding.weight, std=0.2)

    def forward(self, z: Tensor) -> tuple[Tensor, None, tuple[None, None, Tensor]]:
        indices = torch.cdist(z.movedim(1, -1).reshape(-1, 5), self.embedding.weight).argmin(1)
        codes = self.embedding(indices).view(*z.movedim(1, -1).shape).movedim(-1, 1)
        return codes, None, (None, None, indices)

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, ...], channel_first: bool = True) -> Tensor:
        assert indices.ndim == 1
        batch, *sides = (shape[0], *shape[2:]) if self.channels_second else shape[:3]
        assert shape[1 if self.channels_second else 3] == 5
        return self.embedding(indices).view(batch, *sides, 5).movedim(-1, 1)


class _VQ(nn.Module):
    """The methods that taming and LlamaGen publish."""

    def __init__(self, *, channels_second: bool) -> None:
        super().__init__()
        self.encoder, self.quantize = _Encoder(5), _Quantize(channels_second=channels_second)
        self.decoder = nn.ConvTranspose2d(5, 3, 4, stride=4)

    def encode(self, x: Tensor) -> tuple[Tensor, Any, Any]:
        return self.quantize(self.encoder(x))

    def decode(self, quant: Tensor) -> Tensor:
        return self.decoder(quant)

    def decode_code(self, code_b: Tensor, shape: Any = None, channel_first: bool = True) -> Tensor:
        return self.decode(self.quantize.get_codebook_entry(code_b, shape, channel_first))


class _Bits(nn.Module):
    """Open-MAGVIT2's quantizer: signs, bit i of the index first; its look-up wants (B, h * w)."""

    codebook_size, codebook_dim, token_factorization = 32, 5, False

    def forward(self, z: Tensor, return_loss_breakdown: bool = False) -> Any:
        indices = ((z > 0) * 2 ** torch.arange(5).view(5, 1, 1)).sum(1)
        return (torch.where(z > 0, 1.0, -1.0), None, indices.flatten()), "breakdown"

    def get_codebook_entry(self, x: Tensor, bhwc: tuple[int, ...], order: str) -> Tensor:
        assert x.ndim == 2
        signs = ((x.unsqueeze(-1) & 2 ** torch.arange(5)) != 0) * 2.0 - 1
        return signs.view(bhwc).movedim(-1, 1)


class _Magvit(nn.Module):
    """The methods that Open-MAGVIT2 publishes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.quantize = _Encoder(5), _Bits()
        self.decoder = nn.ConvTranspose2d(5, 3, 4, stride=4)

    def encode(self, x: Tensor) -> tuple[Any, ...]:
        (quant, loss, info), breakdown = self.quantize(self.encoder(x), return_loss_breakdown=True)
        return quant, loss, info, breakdown

    def decode(self, quant: Tensor) -> Tensor:
        return self.decoder(quant)


class _CosmosEncoder(nn.Module):
    """(indices, codes, loss), as encoder.jit returns."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = _Encoder(1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.encoder(x)
        return (z[:, 0] > 0).int(), z, z.mean()


class _CosmosDecoder(nn.Module):
    """Indices to images, as decoder.jit."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.ConvTranspose2d(1, 3, 4, stride=4)

    def forward(self, indices: Tensor) -> Tensor:
        return self.decoder(indices.unsqueeze(1).to(self.decoder.weight.dtype))


def diffusers_model(*, lookup: bool) -> nn.Module:
    models = pytest.importorskip("diffusers.models.autoencoders.vq_model")
    model: nn.Module = models.VQModel(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        num_vq_embeddings=16,
        latent_channels=4,
        lookup_from_codebook=lookup,
    )
    # As initialized, its codes lie so close together that nearly all latents would get one of them.
    with torch.no_grad():
        latents = model.encode(torch.rand(1, 3, 16, 16) * 2 - 1).latents
        model.quantize.embedding.weight.copy_(latents.flatten(2)[0].T)
    return model


def cosmos() -> adapters.Tokenizer:
    return adapters.cosmos(_CosmosEncoder(), _CosmosDecoder(), stride=4, num_codes=2)


def own_pass(model: Any) -> Callable[[Tensor], Tensor]:
    """The whole pass as the model's own code writes it."""
    return lambda images: model.decode(model.encode(images)[0])


CASES: dict[str, Callable[[], tuple[adapters.Tokenizer, Callable[[Tensor], Tensor]]]] = {
    "taming": lambda: (adapters.taming(m := _VQ(channels_second=False)), own_pass(m)),
    "llamagen": lambda: (adapters.llamagen(m := _VQ(channels_second=True)), own_pass(m)),
    "open_magvit2": lambda: (adapters.open_magvit2(m := _Magvit(), stride=4), own_pass(m)),
    "diffusers": lambda: (adapters.diffusers(m := diffusers_model(lookup=False)), lambda x: m(x).sample),
}
# Importing diffusers takes seconds.
NAMES = [name if name != "diffusers" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("name", NAMES)
def test_decoded_indices_are_the_pass_of_the_model(name: str) -> None:
    """Encode and decode together are what the model's own forward pass gives; sides differ, so none is swapped."""
    tokenizer, whole = CASES[name]()
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    indices = tokenizer.encode(images)
    assert indices.shape == (2, 4, 6)
    assert indices.dtype == torch.int64
    assert indices.unique().numel() > 2
    assert indices.max() < tokenizer.num_codes
    assert torch.allclose(tokenizer.decode(indices), whole(images), atol=1e-5)
    assert not torch.allclose(tokenizer.decode(indices.flip(-1)), whole(images), atol=1e-2)


@pytest.mark.slow
def test_diffusers_models_that_look_codes_up_decode_the_same() -> None:
    """The switch of aMUSEd changes the call, not the picture."""
    plain, lookup = diffusers_model(lookup=False), diffusers_model(lookup=True)
    lookup.load_state_dict(plain.state_dict())
    indices = torch.arange(16).view(1, 4, 4)
    pictures = [adapters.diffusers(model).decode(indices) for model in (plain, lookup)]
    assert torch.equal(*pictures)


def test_cosmos_takes_the_first_of_what_the_encoder_returns() -> None:
    """Indices become int64, and images go through in the dtype of the weights."""
    torch.manual_seed(0)
    encoder, decoder = _CosmosEncoder().bfloat16(), _CosmosDecoder().bfloat16()
    tokenizer = adapters.cosmos(encoder, decoder, stride=4, num_codes=2)
    images = torch.rand(1, 3, 8, 16) * 2 - 1
    indices = tokenizer.encode(images)
    assert torch.equal(indices, encoder(images.bfloat16())[0].long())
    picture = tokenizer.decode(indices)
    assert picture.dtype == torch.float32
    assert torch.equal(picture, decoder(indices).float())


@pytest.mark.parametrize("name", [*NAMES, "cosmos"])
def test_measurements_take_the_functions(name: str) -> None:
    """Stride and number of codes are those of the model: the report counts tokens in the right grid."""
    tokenizer = cosmos() if name == "cosmos" else CASES[name]()[0]
    report = measure_equivariance(
        tokenizer.encode,
        torch.rand(1, 3, 16, 16) * 2 - 1,
        protocol="circular",
        stride=tokenizer.stride,
        num_codes=tokenizer.num_codes,
        reconstruct=tokenizer.reconstruct,
        shifts=[(4, 0)],
        sub_stride_shifts=[(1, 0)],
        variants={},
        resamples=0,
    )
    assert report.settings.stride == 4
    assert report.reconstruction is not None
    assert 0 <= report.aligned.rate <= 1


def test_factorized_tokens_are_refused() -> None:
    """They are two grids."""
    model = _Magvit()
    model.quantize.token_factorization = True
    with pytest.raises(ValueError, match="model must be of one index per token, got factorized tokens"):
        adapters.open_magvit2(model, stride=4)


@pytest.mark.parametrize(
    ("adapter", "match"),
    [
        (adapters.diffusers, "model must be a VQModel of diffusers, got Linear without encode, quantize"),
        (adapters.taming, "model must be a VQModel of taming-transformers, got Linear without encode"),
        (adapters.llamagen, "model must be a VQModel of LlamaGen, got Linear without encode"),
        (lambda m: adapters.open_magvit2(m, stride=4), "model must be a VQModel of Open-MAGVIT2, got Linear"),
    ],
)
def test_another_module_is_refused_by_what_it_lacks(adapter: Callable[[nn.Module], object], match: str) -> None:
    """Before anything runs."""
    with pytest.raises(TypeError, match=match):
        adapter(nn.Linear(1, 1))


def test_a_gumbel_quantizer_of_taming_is_refused() -> None:
    """It has no get_codebook_entry of this form."""
    model = _VQ(channels_second=False)
    model.quantize = nn.Identity()
    with pytest.raises(TypeError, match=r"model\.quantize must be a VectorQuantizer2, got Identity without"):
        adapters.taming(model)


class _Config:
    """What diffusers' FrozenDict is: fields as attributes."""

    block_out_channels, lookup_from_codebook = (8, 8, 8), False


class _DiffusersQuantize(nn.Module):
    """The fields of diffusers' quantizer."""

    re_embed, vq_embed_dim = 16, 5

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, ...]) -> Tensor:
        raise NotImplementedError


def vq(name: str) -> Any:
    """A stand-in that the adapter of that name accepts."""
    if name == "open_magvit2":
        return _Magvit()
    model: Any = _VQ(channels_second=name == "llamagen")
    if name == "diffusers":
        model.quantize, model.config = _DiffusersQuantize(), _Config()
    return model


ADAPTERS: dict[str, Callable[..., adapters.Tokenizer]] = {
    "diffusers": adapters.diffusers,
    "taming": adapters.taming,
    "llamagen": adapters.llamagen,
    "open_magvit2": lambda m: adapters.open_magvit2(m, stride=4),
}
OWN = "write the two functions of an adapters.Tokenizer yourself"
# Adapter, the part that is replaced by another one (by nothing if empty), the field that it lacks then, the cure.
LACKING = [
    ("diffusers", "config", "block_out_channels, lookup_from_codebook", OWN),
    ("diffusers", "quantize", "get_codebook_entry, re_embed, vq_embed_dim", OWN),
    ("taming", "encoder", "num_resolutions", "pass stride"),
    ("taming", "quantize", "get_codebook_entry, e_dim", OWN),
    ("taming", "quantize.n_e", "n_e", "pass num_codes"),
    ("llamagen", "encoder", "num_resolutions", "pass stride"),
    ("llamagen", "quantize", "e_dim", OWN),
    ("llamagen", "quantize.n_e", "n_e", "pass num_codes"),
    ("open_magvit2", "quantize", "get_codebook_entry, codebook_size, codebook_dim", OWN),
]


@pytest.mark.parametrize(("name", "part", "fields", "cure"), LACKING)
def test_a_part_of_another_class_is_refused_by_what_it_lacks(name: str, part: str, fields: str, cure: str) -> None:
    """In one TypeError with the way out, before anything runs; the whole model is accepted."""
    model = vq(name)
    assert ADAPTERS[name](model).stride == 4
    if part == "quantize.n_e":
        del model.quantize.n_e
    else:
        setattr(model, part, {} if part == "config" else nn.Identity())
    owner = {"config": "dict", "quantize.n_e": "_Quantize"}.get(part, "Identity")
    place = rf"model\.{part.partition('.')[0]} must be .*, got {owner} without {fields}; {cure}"
    with pytest.raises(TypeError, match=place):
        ADAPTERS[name](model)


@pytest.mark.parametrize("name", ["taming", "llamagen"])
def test_given_facts_replace_those_of_the_model(name: str) -> None:
    """A model that does not tell its stride or its codes, or has no encoder at all, gets them from the caller."""
    model = vq(name)
    encoder, images = model.encoder, torch.rand(1, 3, 16, 16) * 2 - 1
    told = ADAPTERS[name](model)
    del model.encoder, model.quantize.n_e
    model.encode = lambda x: model.quantize(encoder(x))
    with pytest.raises(TypeError, match="got _VQ without encoder; pass stride"):
        ADAPTERS[name](model, num_codes=16)
    tokenizer = ADAPTERS[name](model, stride=4, num_codes=16)
    assert (tokenizer.stride, tokenizer.num_codes) == (told.stride, told.num_codes) == (4, 16)
    indices = told.encode(images)
    assert torch.equal(tokenizer.encode(images), indices)
    assert torch.equal(tokenizer.decode(indices), told.decode(indices))
    with pytest.raises(ValueError, match="stride must be an int >= 1, got 0"):
        ADAPTERS[name](model, stride=0, num_codes=16)


def test_remapped_codes_of_taming_count() -> None:
    """A quantizer that maps its indices has as many codes as the map has targets."""
    model = vq("taming")
    model.quantize.re_embed = 8
    assert adapters.taming(model).num_codes == 8


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_cosmos_refuses_what_is_no_module(part: str) -> None:
    """A path, for example, is not loaded here."""
    parts = {"encoder": _CosmosEncoder(), "decoder": _CosmosDecoder(), part: "encoder.jit"}
    with pytest.raises(TypeError, match=f"{part} must be a module, as torch.jit.load returns, got 'encoder.jit'"):
        adapters.cosmos(parts["encoder"], parts["decoder"], stride=8)


def test_the_bits_of_the_stand_in_are_those_of_this_library() -> None:
    """The stand-in for Open-MAGVIT2 orders bits as the published code, and as LFQ here."""
    lfq = LFQ(code_dim=5)
    z = torch.randn(1, 5, 3, 3)
    (_, _, indices), _ = _Bits()(z)
    assert torch.equal(lfq.encode(z).flatten(), indices)
