"""The paper's two tasks on a finished GPT: captions to images, images to captions; and what limits both.

Shape letters: B images, P = 5 places, M tokens of an image, h w token grid, T caption tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from examples.te_vqgan.classifier.model import CellClassifier, crop_places, feature_distance
from examples.te_vqgan.data.pairs import CaptionedImages
from examples.te_vqgan.data.quadrants import QuadrantDataset
from examples.te_vqgan.stage1.losses import Perceptual
from examples.te_vqgan.stage2.image_tokens import decode_images, encode_images, sequence_order
from examples.te_vqgan.stage2.rules import Rule
from examples.te_vqgan.stage2.scores import Scores
from examples.te_vqgan.stage2.settings import DIRECTIONS
from examples.te_vqgan.stage2.transformers import Transformer
from te_quant import VQAutoencoder

__all__ = ["draw_images", "evaluate_pairs", "read_places", "read_tokenizer", "write_captions"]

_BATCH = 250
_PICTURES = 16


@torch.inference_mode()
def draw_images(
    gpt: Transformer, autoencoder: VQAutoencoder, text: Tensor, rule: Rule, generator: torch.Generator
) -> Tensor:
    """Sample the image of each caption.

    Args:
        gpt: in evaluation mode.
        autoencoder: decodes the tokens.
        text: caption tokens.
        rule: from how many codes to draw.
        generator: on the GPT's device; the only source of chance.

    Shape:
        text: (B, T) int64. result: (B, 3, S, S).
    """
    tokens = gpt.generate(
        text,
        order=sequence_order("text_to_image", gpt.config.segments),
        top_k=rule.images,
        generator=generator,
    )[:, text.shape[1] :]
    image = next(segment for segment in gpt.config.segments if segment.name == "image")
    return decode_images(autoencoder, tokens, image.shape)


@torch.inference_mode()
def write_captions(
    gpt: Transformer, pairs: CaptionedImages, tokens: Tensor, rule: Rule, generator: torch.Generator
) -> list[str]:
    """Write a caption of each image, token by token.

    Args:
        gpt: in evaluation mode.
        pairs: how captions are written in tokens.
        tokens: of the images.
        rule: from how many words to draw.
        generator: on the GPT's device; the only source of chance.

    Shape:
        tokens: (B, M) int64.
    """
    written = gpt.generate(
        tokens,
        order=sequence_order("image_to_text", gpt.config.segments),
        top_k=rule.captions,
        generator=generator,
        stop_token=pairs.tokenizer.end_token,
    )
    return pairs.tokenizer.decode(written[:, tokens.shape[1] :].cpu())


@torch.inference_mode()
def read_places(classifier: CellClassifier, images: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Read digit and colour at every place, whether there is one or not.

    Shape:
        images: (B, 3, S, S). results: (B, P) classes and (B, P) colours.
    """
    cells = crop_places(images.clamp(-1, 1))
    output = classifier(cells.flatten(0, 1))
    digits, colors = (logits.argmax(1).reshape(cells.shape[:2]).cpu().numpy() for logits in output)
    return digits, colors


@torch.inference_mode()
def read_tokenizer(
    autoencoder: VQAutoencoder,
    classifier: CellClassifier,
    images: QuadrantDataset,
    num_classes: int,
    *,
    device: torch.device,
    perceptual: Mapping[str, Perceptual] | None = None,
) -> dict[str, Any]:
    """Say what survives the tokenizer: digits read in images, and in what is decoded from their tokens.

    The second says what the tokens can show. It is no bound on a text-to-image model: images that are more typical
    than test images, as those of a GPT that samples from few codes, are easier to read.

    Args:
        autoencoder: the tokenizer, in evaluation mode, as the classifier.
        classifier: reads the images.
        images: the data.
        num_classes: L.
        device: of both models.
        perceptual: distances to measure too, by name.

    Returns:
        Numbers for JSON: ``original`` and ``reconstruction``, from :meth:`~.stage2.scores.Scores.to_dict`, and
        ``feature_distance``, the mean distance of an image and its reconstruction in the classifier's features,
        which is not LPIPS; ``perceptual_distances``, their mean by each of ``perceptual``, if there are any.
    """
    tasks = {name: Scores(num_classes) for name in ("original", "reconstruction")}
    distance, perceived = 0.0, dict.fromkeys(perceptual or {}, 0.0)
    for start in range(0, len(images), _BATCH):
        recipe = images.recipes[start : start + _BATCH]
        truth = (images.classes(recipe), recipe.colors)
        originals = images.images.render(recipe).to(device)
        rebuilt = autoencoder(originals).reconstruction.clamp(-1, 1)
        for name, pictures in (("original", originals), ("reconstruction", rebuilt)):
            tasks[name].update(truth, read_places(classifier, pictures))
        distance += float(feature_distance(classifier, rebuilt, originals).double().sum())
        for name, measure in (perceptual or {}).items():
            perceived[name] += float(measure(rebuilt, originals).double().mean()) * len(originals)
    numbers: dict[str, Any] = {name: scores.to_dict() for name, scores in tasks.items()}
    numbers["feature_distance"] = distance / len(images)
    if perceived:
        numbers["perceptual_distances"] = {name: value / len(images) for name, value in perceived.items()}
    return numbers


@torch.inference_mode()
def evaluate_pairs(
    gpt: Transformer,
    autoencoder: VQAutoencoder,
    classifier: CellClassifier,
    pairs: CaptionedImages,
    rule: Rule,
    *,
    seed: int,
    device: torch.device,
    progress: Callable[[int], object] = lambda _: None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure both tasks on every pair, with the first caption of each image.

    Args:
        gpt: in evaluation mode, as the two models below.
        autoencoder: the tokenizer.
        classifier: reads the images.
        pairs: the data.
        rule: how to draw.
        seed: of what is drawn. Images and captions have a generator each, so that one rule's images do not depend
            on its captions.
        device: of all models.
        progress: told the number of pairs after each batch.

    Returns:
        Numbers for JSON by task, ``text_to_image`` and ``image_to_text``; :meth:`~.stage2.scores.Scores.to_dict`
        gives them. Then the first few pairs: ``images`` and ``generated`` (B, 3, S, S) uint8, ``captions`` and
        ``written`` lists of texts.
    """
    tasks = {name: Scores(len(pairs.grammar.class_names)) for name in DIRECTIONS}
    drawing, writing = (torch.Generator(device).manual_seed(seed) for _ in range(2))
    shown: dict[str, Any] = {}
    for start in range(0, len(pairs), _BATCH):
        rows = np.arange(start, min(start + _BATCH, len(pairs)))
        truth = pairs.classes_colors(rows)
        captions = pairs.captions(rows, 0)
        images = pairs.dataset.fixed(start, start + len(rows))
        tokens = encode_images(autoencoder, images.to(device))
        text = pairs.tokenizer.encode(captions).to(device)
        generated = draw_images(gpt, autoencoder, text, rule, drawing)
        written = write_captions(gpt, pairs, tokens, rule, writing)
        tasks["text_to_image"].update(truth, read_places(classifier, generated))
        tasks["image_to_text"].update(truth, pairs.parse(written))
        if start == 0:
            shown = {"images": _bytes(images[:_PICTURES]), "generated": _bytes(generated[:_PICTURES])}
            shown |= {"captions": captions[:_PICTURES], "written": written[:_PICTURES]}
        progress(start + len(rows))
    return {name: scores.to_dict() for name, scores in tasks.items()}, shown


def _bytes(images: Tensor) -> Tensor:
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
