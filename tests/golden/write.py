"""Write the golden files: what the code of commit 16434b1 computes, and the checkpoints and run folders it leaves.

Run it with that code, not with this one, from an empty folder, with one thread::

    git worktree add --detach OLD 16434b1
    OMP_NUM_THREADS=1 PYTHONPATH=OLD/src:OLD python tests/golden/write.py tests/golden

The tests never run it. They load what it wrote with the current code, however that has changed since.

Another CPU rounds floats in another way, and a latent vector that lies between two codes would then get the other
one. So all latents and images here are *steady*: a perturbation of 1e-2 of each latent vector (of 1e-3 of each
image) changes no index and no phase. That is at least a thousand times the rounding error of float32. Among the 64
tokens of an image under the published weights, some are always nearer to a border. There the perturbation is 2e-5,
and float64 must agree.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import os
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import te_quant
from te_quant import GPT, AutoencoderConfig, GPTConfig, Segment, VQAutoencoder

COMMIT = "16434b10858b"
STEADY_LATENTS, STEADY_IMAGES, STEADY_TOKENS = 1e-2, 1e-3, 2e-5
PERTURBATIONS = 40

_TABLE = {"num_codes": 8, "code_dim": 4}
# Defaults at that commit, or what equals it since: the table names them, as later versions have others.
_WERE_DEFAULTS = {
    "codebook_update": "gradient",
    "commitment_weight": 0.25,
    "decay": 0.99,
    "revival_threshold": 0.0,
}
_CODEBOOKS = ("VectorQuantizer", "ResidualVectorQuantizer")
QUANTIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vq": ("VectorQuantizer", {**_TABLE}),
    "vq-penalty": ("VectorQuantizer", {**_TABLE, "orthogonal_reg": 10.0, "orthogonal_active_only": True}),
    "vq-subset": (
        "VectorQuantizer",
        {**_TABLE, "orthogonal_reg": 1.0, "orthogonal_max_codes": 5, "gradient_estimator": "rotation_trick"},
    ),
    "vq-temperature": ("VectorQuantizer", {**_TABLE, "temperature": 0.5, "commitment_weight": 1.0}),
    "vq-ema-cosine": (
        "VectorQuantizer",
        {**_TABLE, "codebook_update": "ema", "metric": "cosine", "orthogonal_reg": 3.0, "decay": 0.5},
    ),
    "rvq": ("ResidualVectorQuantizer", {**_TABLE, "num_quantizers": 3, "orthogonal_reg": 10.0}),
    "rvq-shared": (
        "ResidualVectorQuantizer",
        {**_TABLE, "num_quantizers": 2, "shared_codebook": True, "codebook_update": "ema", "decay": 0.5},
    ),
    "rvq-dropout": ("ResidualVectorQuantizer", {**_TABLE, "num_quantizers": 3, "quantizer_dropout": True}),
    "fsq": ("FSQ", {"levels": [8, 5, 2, 5]}),
    "lfq": ("LFQ", {"code_dim": 4}),
    "lfq-groups": ("LFQ", {"code_dim": 5, "entropy_group_dim": 2, "temperature": 0.5}),
    "sim": ("SimVQ", {**_TABLE, "channel_dim": -1, "gradient_estimator": "rotation_trick", "decay": 0.5}),
}
# The quantizers whose training step draws at random, so that forward takes a generator.
RANDOM = ("vq-subset", "vq-temperature", "rvq-dropout")

_SMALL = AutoencoderConfig(
    base_channels=2,
    channel_multipliers=(1, 1),
    attention_levels=(),
    norm_groups=1,
    num_codes=8,
    code_dim=4,
)
_CIRCULAR = {"encoder_padding": "circular", "decoder_padding": "circular"}
AUTOENCODERS: dict[str, AutoencoderConfig] = {
    "ema-cosine": dataclasses.replace(
        _SMALL, channel_multipliers=(1, 2), codebook_update="ema", metric="cosine", orthogonal_reg=1.0
    ),
    "polyphase": dataclasses.replace(
        _SMALL,
        image_channels=1,
        downsample="polyphase",
        upsample="polyphase",
        norm="channel",
        gradient_estimator="rotation_trick",
        **_CIRCULAR,
    ),
    "fourier": dataclasses.replace(
        _SMALL, downsample="fourier", upsample="fourier", activation="polynomial", **_CIRCULAR
    ),
    "blur-attention": dataclasses.replace(
        _SMALL, downsample="conv_blur_pool", upsample="blur", attention_levels=(1,), encoder_padding="zeros"
    ),
}
# In float64, which a checkpoint keeps.
DOUBLE = ("polyphase",)


def generator(seed: int) -> torch.Generator:
    """Of everything that is drawn here."""
    return torch.Generator().manual_seed(seed)


def losses(output: Any) -> Tensor:
    """(4,), the loss and its three terms."""
    terms = (output.loss, output.codebook_loss, output.commitment_loss, output.regularization_loss)
    return torch.stack([term.detach() for term in terms])


def built_quantizer(kind: str, options: dict[str, Any]) -> torch.nn.Module:
    """A quantizer with a history: codes among the latents, and statistics of two batches."""
    torch.manual_seed(1)
    quantizer = getattr(te_quant, kind)(**options)
    if kind == "SimVQ":
        torch.nn.init.normal_(quantizer.basis)
    seen = torch.randn(3, 60, quantizer.code_dim, generator=generator(2))
    if hasattr(quantizer, "kmeans_init"):
        quantizer.kmeans_init(seen[0], generator=generator(3))
    for batch in seen[1:]:
        quantizer(batch)
    return quantizer


def steady_latents(quantizer: Any, options: dict[str, Any]) -> Tensor:
    """(2, C, 3, 4) latents, or (2, 12, C) for ``channel_dim=-1``, none of them near the border of two codes."""
    draws = generator(4)
    rows = torch.randn(2000, quantizer.code_dim, generator=draws)
    chosen = quantizer.encode(rows)
    steady = torch.ones(len(rows), dtype=torch.bool)
    for _ in range(PERTURBATIONS):
        moved = rows + STEADY_LATENTS * (2 * torch.rand(rows.shape, generator=draws) - 1)
        steady &= (quantizer.encode(moved) == chosen).reshape(len(rows), -1).all(1)
    kept = rows[steady][:24]
    assert len(kept) == 24
    if options.get("channel_dim") == -1:
        return kept.reshape(2, 12, -1)
    return kept.reshape(2, 3, 4, -1).movedim(-1, 1).contiguous()


def write_quantizers(folder: Path) -> None:
    """One evaluation and one training step of every quantizer."""
    tensors: dict[str, Tensor] = {}
    for name, (kind, options) in QUANTIZERS.items():
        quantizer = built_quantizer(kind, options)
        latents = steady_latents(quantizer, options)
        found = {f"before.{key}": value.clone() for key, value in quantizer.state_dict().items()}
        output = quantizer.eval()(latents)
        assert torch.equal(output.indices, quantizer.encode(latents))
        found |= {"latents": latents, "indices": output.indices, "codes": output.codes, "losses": losses(output)}
        quantizer.train()
        leaf = latents.clone().requires_grad_()
        output = quantizer(leaf, generator=generator(5)) if name in RANDOM else quantizer(leaf)
        (output.loss + output.quantized.square().mean()).backward()
        found |= {"trained.indices": output.indices, "trained.codes": output.codes, "gradient": leaf.grad}
        found["trained.losses"] = losses(output)
        with torch.no_grad():
            for parameter in quantizer.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
        found |= {f"after.{key}": value for key, value in quantizer.state_dict().items()}
        tensors |= {f"{name}/{key}": value.detach().clone().contiguous() for key, value in found.items()}
    save_file(tensors, folder / "quantizers.safetensors")
    table = {
        name: {
            "class": kind,
            "options": {**_WERE_DEFAULTS, **options} if kind in _CODEBOOKS else options,
            "random": name in RANDOM,
        }
        for name, (kind, options) in QUANTIZERS.items()
    }
    (folder / "quantizers.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def trained_autoencoder(config: AutoencoderConfig, dtype: torch.dtype) -> VQAutoencoder:
    """A model after three steps of Adam, with codes among its latents."""
    torch.manual_seed(6)
    model = VQAutoencoder(config).to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    images = torch.rand(3, 4, config.image_channels, 16, 16, generator=generator(7)).to(dtype) * 2 - 1
    model.quantizer.kmeans_init(model.encode(images[0]).detach(), generator=generator(8))
    for batch in images:
        output = model(batch)
        optimizer.zero_grad()
        (output.loss + (output.reconstruction - batch).abs().mean()).backward()
        optimizer.step()
    model.quantizer.kmeans_init(model.encode(images[0]).detach(), generator=generator(8))
    return model.eval()


def is_steady(model: VQAutoencoder, images: Tensor, size: float = STEADY_IMAGES) -> bool:
    """Whether no index and no phase hangs on rounding, or on noise of this size."""
    draws = generator(9)
    tokens, phases = model.encode_to_indices(images), model.encode_with_phases(images).phases
    if not torch.equal(copy.deepcopy(model).double().encode_to_indices(images.double()), tokens):
        return False
    for _ in range(PERTURBATIONS):
        noise = 2 * torch.rand(images.shape, generator=draws).to(images.dtype) - 1
        moved = images + size * noise
        if not torch.equal(model.encode_to_indices(moved), tokens):
            return False
        if not torch.equal(model.encode_with_phases(moved).phases, phases):
            return False
    return True


def write_autoencoders(folder: Path) -> None:
    """A checkpoint of each config, and what its model makes of two images."""
    for name, config in AUTOENCODERS.items():
        dtype = torch.float64 if name in DOUBLE else torch.float32
        model = trained_autoencoder(config, dtype)
        with torch.no_grad():
            for seed in range(1000):
                images = torch.rand(2, config.image_channels, 8, 12, generator=generator(seed)).to(dtype) * 2 - 1
                if is_steady(model, images):
                    break
            else:
                raise AssertionError(f"{name}: no steady images")
            output = model(images)
        (folder / "autoencoders").mkdir(exist_ok=True)
        model.save_pretrained(folder / "autoencoders" / name)
        found = {"images": images, "indices": output.indices, "phases": output.phases, "latents": output.latents}
        found |= {"reconstruction": output.reconstruction, "losses": losses(output)}
        tensors = {key: value.contiguous() for key, value in found.items()}
        save_file(tensors, folder / "autoencoders" / f"{name}.safetensors")


def write_gpt(folder: Path) -> None:
    """A checkpoint with all kinds of positions, its logits in two orders, and what it writes greedily."""
    torch.manual_seed(10)
    text = Segment("text", 5, (3,), "learned", pad_token=0)
    segments = (text, Segment("style", 3, (2,), "sinusoidal"), Segment("image", 7, (2, 2), "axial"))
    model = GPT(GPTConfig(segments, width=8, depth=2, num_heads=2, mlp_ratio=2, tied_head=False)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator(parameter.numel())) / 3)
        rows = {
            segment.name: torch.randint(segment.vocab_size, (2, segment.length), generator=generator(11))
            for segment in segments
        }
        orders = {"forward": ("text", "style", "image"), "backward": ("image", "text")}
        found = {}
        for name, order in orders.items():
            tokens = torch.cat([rows[part] for part in order], 1)
            logits = model(tokens, order)
            found |= {f"{name}.tokens": tokens, f"{name}.logits": logits}
            written = model.generate(rows[order[0]], order=order, temperature=0)
            best = model(written, order)[:, rows[order[0]].shape[1] :].topk(2).values
            assert float((best[..., 0] - best[..., 1]).min()) > 1e-3
            found[f"{name}.written"] = written
    model.save_pretrained(folder / "gpt")
    save_file({key: value.contiguous() for key, value in found.items()}, folder / "gpt.safetensors")


def write_published(folder: Path) -> None:
    """Tokens and captions that the published weights give to test images."""
    from examples.te_vqgan.evaluation import dataset
    from examples.te_vqgan.presets import settings_for
    from examples.te_vqgan.sources import load_digits

    import examples.te_vqgan

    weights = Path(examples.te_vqgan.__file__).parent / "results" / "small" / "weights"
    tokenizer = VQAutoencoder.from_pretrained(weights / "tokenizer").float()
    gpt = GPT.from_pretrained(weights / "gpt").float()
    settings = settings_for("small", "stride_exact", {"data": "digits"})
    images = dataset(settings, load_digits("digits", None), "test").fixed(0, 50)
    kept = []
    with torch.no_grad():
        for image in images.split(1):
            indices = tokenizer.encode_to_indices(image).flatten(1)
            caption = gpt.generate(indices, order=("image", "text"), temperature=0)
            best = gpt(caption, ("image", "text"))[:, indices.shape[1] :].topk(2).values
            if is_steady(tokenizer, image, STEADY_TOKENS) and float((best[..., 0] - best[..., 1]).min()) > 1e-2:
                kept.append((image, indices.view(1, 8, 8), caption[:, indices.shape[1] :]))
    images, indices, captions = (torch.cat(parts[:3]) for parts in zip(*kept, strict=True))
    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(pixels / 127.5 - 1, images)
    tensors = {"pixels": pixels, "indices": indices.to(torch.int16), "captions": captions.to(torch.int16)}
    save_file(tensors, folder / "published.safetensors")


def packed(source: Path, target: Path, left_out: tuple[str, ...]) -> None:
    """Put the files below ``source`` into an archive that has the same bytes each time."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.mtime = info.uid = info.gid = 0
        info.uname = info.gname = ""
        info.mode = 0o644
        return info

    with tarfile.open(target, "w:xz", preset=9) as archive:
        for path in sorted(source.rglob("*")):
            name = str(path.relative_to(source))
            if path.is_file() and not any(part in name for part in left_out):
                info = plain(archive.gettarinfo(path, name))
                archive.addfile(info, io.BytesIO(path.read_bytes()))


def write_smoke(folder: Path) -> None:
    """A run of the preset ``smoke``, without weights and pictures: what ``run`` skips and ``report`` reads."""
    from examples.te_vqgan.__main__ import main

    words = ["--preset", "smoke", "--data", "digits", "--out", "run"]
    assert main(["run", *words, "--arms", "te_vqgan", "--threads", "1", "--workers", "1"]) == 0
    drawn = (".png", ".html", "report/samples", "results.json")
    left_out = ("checkpoint", "tensorboard", "tokens.", "/model/", ".lock", "console.txt")
    packed(Path("run"), folder / "smoke.tar.xz", (*drawn, *left_out))


def write_tiny(folder: Path) -> None:
    """Runs of a model so small that its weights fit here: one that is measured again, one that goes on."""
    from examples.te_vqgan.classifier_trainer import CLASSIFIERS, train_classifier
    from examples.te_vqgan.evaluate import evaluate_gpt, evaluate_tokenizer
    from examples.te_vqgan.presets import settings_for
    from examples.te_vqgan.provenance import Execution
    from examples.te_vqgan.sources import load_digits
    from examples.te_vqgan.stage2_settings import stage2_settings_for

    from examples.te_vqgan.stage1 import Interrupted, train_stage1
    from examples.te_vqgan.stage2 import train_stage2

    source, where = load_digits("digits", None), Execution(threads=1)
    base = settings_for("smoke", "te_vqgan")
    model = dataclasses.replace(base.model, base_channels=2, norm_groups=1, channel_multipliers=(1, 1, 1))
    settings, again = (dataclasses.replace(base, model=model, seed=seed) for seed in (0, 1))
    out = Path("tiny")
    finished, stopped, ended = (out / name for name in ("finished", "stopped", "ended"))
    reader = dataclasses.replace(CLASSIFIERS["smoke"], widths=(4, 4))
    train_classifier(reader, out / "classifier", source, execution=where, progress=False)
    train_stage1(settings, finished, source, execution=where, progress=False)
    second = stage2_settings_for("smoke", {"width": 8})
    train_stage2(second, finished, source, execution=where, progress=False)
    evaluate_tokenizer(finished, out / "classifier", source, execution=where)
    evaluate_gpt(second, finished, out / "classifier", source, execution=where, progress=False)
    with contextlib.suppress(Interrupted):
        train_stage1(again, stopped, source, execution=where, progress=False, stop=lambda done: done == 3)
    train_stage1(again, ended, source, execution=where, progress=False)
    for path in (*(out / "classifier").rglob("checkpoint*"), *finished.rglob("checkpoint*")):
        path.unlink()
    left_out = (
        "tensorboard",
        "samples.",
        "generation.s",
        "tokens.",
        ".lock",
        "ended/checkpoint",
        "ended/evaluation",
    )
    packed(out, folder / "tiny.tar.xz", left_out)


def main() -> None:
    """Write everything into the folder that the command line names."""
    from examples.te_vqgan.provenance import git_commit

    assert git_commit() == COMMIT, git_commit()
    folder = Path(sys.argv[1]).resolve()
    torch.set_num_threads(1)
    write_quantizers(folder)
    write_autoencoders(folder)
    write_gpt(folder)
    write_published(folder)
    with tempfile.TemporaryDirectory() as scratch:
        # What was typed is recorded, so no path of this machine may be in it.
        os.chdir(scratch)
        write_smoke(folder)
        write_tiny(folder)


if __name__ == "__main__":
    main()
