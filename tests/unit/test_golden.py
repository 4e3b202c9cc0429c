"""What earlier code saved still loads, and gives the tokens, images and gradients that it gave then."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import te_quant
from te_quant import GPT, VQAutoencoder
from tests.golden_files import GOLDEN, differing, golden_tensors, same

QUANTIZERS = json.loads((GOLDEN / "quantizers.json").read_text(encoding="utf-8"))
AUTOENCODERS = sorted(path.name for path in (GOLDEN / "autoencoders").iterdir() if path.is_dir())
ORDERS = {"forward": ("text", "style", "image"), "backward": ("image", "text")}


def _quantizer(name: str, state: str) -> Any:
    """A fresh quantizer with the state that the old one had ``before`` or ``after`` its training step."""
    quantizer = getattr(te_quant, QUANTIZERS[name]["class"])(**QUANTIZERS[name]["options"])
    quantizer.load_state_dict(golden_tensors("quantizers", f"{name}/{state}."))
    return quantizer


def _losses(output: Any) -> Tensor:
    terms = (output.loss, output.codebook_loss, output.commitment_loss, output.regularization_loss)
    return torch.stack([term.detach() for term in terms])


def _evaluated(quantizer: Any, latents: Tensor) -> dict[str, Tensor]:
    output = quantizer.eval()(latents)
    return {"indices": output.indices, "codes": output.codes, "losses": _losses(output)}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizer_gives_the_codes_it_gave(name: str) -> None:
    """From its old state_dict: indices, codes and every loss, and ``encode`` and ``decode`` agree."""
    golden = golden_tensors("quantizers", f"{name}/")
    quantizer = _quantizer(name, "before")
    found = _evaluated(quantizer, golden["latents"])
    assert differing(found, {key: golden[key] for key in found}) == []
    assert torch.equal(quantizer.encode(golden["latents"]), golden["indices"])
    assert same(quantizer.decode(golden["indices"]).detach(), golden["codes"])


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizer_trains_as_it_did(name: str) -> None:
    """One step from the old state, with the old draws: indices, gradient and the state after it.

    Moving averages returned the codes that they moved to, and their losses and gradient. Now they return those of
    the codebook that was searched.
    """
    golden = golden_tensors("quantizers", f"{name}/")
    quantizer = _quantizer(name, "before").train()
    latents = golden["latents"].clone().requires_grad_()
    drawn = {"generator": torch.Generator().manual_seed(5)} if QUANTIZERS[name]["random"] else {}
    output = quantizer(latents, **drawn)
    (output.loss + output.quantized.square().mean()).backward()
    quantizer.apply_pending()
    found = {"trained.indices": output.indices, "trained.codes": output.codes}
    if QUANTIZERS[name]["options"].get("codebook_update") == "ema":
        found["trained.codes"] = quantizer.decode(output.indices)
    else:
        found |= {"trained.losses": _losses(output), "gradient": latents.grad}
    with torch.no_grad():
        for parameter in quantizer.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    assert differing(found, {key: golden[key] for key in found}) == []
    # Compared under the names of today, as loading translates those of then.
    assert differing(quantizer.state_dict(), _quantizer(name, "after").state_dict()) == []


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if QUANTIZERS[name]["class"] not in ("FSQ", "LFQ")])
def test_a_changed_codebook_is_noticed(name: str) -> None:
    """The negative control: what a quantizer learns, 1 % larger, gives other codes."""
    golden = golden_tensors("quantizers", f"{name}/")
    quantizer = _quantizer(name, "before")
    with torch.no_grad():
        # The codebook or a basis; under moving averages a buffer.
        parameter = next(iter(quantizer.state_dict().values()))
        # Twisted, as "cosine" does not see a mere scale.
        parameter += 0.01 * parameter.roll(1, -1)
    assert "codes" in differing(_evaluated(quantizer, golden["latents"]), golden)


def _seen(model: VQAutoencoder, images: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        output = model(images)
    return {
        "indices": output.indices,
        "phases": output.phases,
        "latents": output.latents,
        "reconstruction": output.reconstruction,
        "losses": _losses(output),
    }


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoder_gives_the_tokens_and_images_it_gave(name: str) -> None:
    """From its old folder, in the dtype of then: tokens, phases, latents, reconstruction and losses."""
    golden = golden_tensors(f"autoencoders/{name}")
    model = VQAutoencoder.from_pretrained(GOLDEN / "autoencoders" / name)
    found = _seen(model, golden["images"])
    assert differing(found, {key: golden[key] for key in found}) == []
    assert torch.equal(model.encode_to_indices(golden["images"]), golden["indices"])
    with torch.no_grad():
        assert same(model.decode_indices(golden["indices"], golden["phases"]), golden["reconstruction"])


@pytest.mark.parametrize("name", AUTOENCODERS)
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_changed_weight_is_noticed(name: str, part: str) -> None:
    """The negative control: one layer of the old model, 1 % larger, gives another image."""
    golden = golden_tensors(f"autoencoders/{name}")
    model = VQAutoencoder.from_pretrained(GOLDEN / "autoencoders" / name)
    with torch.no_grad():
        # The last bias: behind every normalization, which would undo a scale.
        list(getattr(model, part).parameters())[-1].mul_(1.01)
    changed = differing(_seen(model, golden["images"]), golden)
    assert ("latents" if part == "encoder" else "reconstruction") in changed


def _gpt() -> GPT:
    return GPT.from_pretrained(GOLDEN / "gpt")


@pytest.mark.parametrize("name", ORDERS)
def test_gpt_predicts_and_writes_what_it_did(name: str) -> None:
    """From its old folder: logits in both orders, and the tokens that it writes without any randomness."""
    golden, order = golden_tensors("gpt", f"{name}."), ORDERS[name]
    model = _gpt()
    with torch.no_grad():
        assert same(model(golden["tokens"], order), golden["logits"])
    length = next(segment.length for segment in model.config.segments if segment.name == order[0])
    written = model.generate(golden["tokens"][:, :length], order=order, temperature=0)
    assert torch.equal(written, golden["written"])


def test_a_changed_weight_of_the_gpt_is_noticed() -> None:
    """The negative control."""
    golden, model = golden_tensors("gpt", "forward."), _gpt()
    with torch.no_grad():
        next(model.blocks.parameters()).mul_(1.01)
        assert not same(model(golden["tokens"], ORDERS["forward"]), golden["logits"])
