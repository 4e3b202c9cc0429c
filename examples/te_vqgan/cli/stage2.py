"""The commands ``classifier``, ``stage2`` and ``evaluate``, from parsed options to the step's function."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from examples.te_vqgan.cli.options import WHERE, execution, out_folder
from examples.te_vqgan.stage1.presets import ARMS, PRESETS
from examples.te_vqgan.stage2.rules import DEFAULT_RULES, RULES

if TYPE_CHECKING:
    from examples.te_vqgan.data.sources import DigitSource
    from examples.te_vqgan.stage2.settings import Stage2Settings

__all__ = ["add_stage2_commands", "classifier_folder"]

Add = Callable[..., argparse.ArgumentParser]
_MEASURE = (*WHERE, "data-dir", "device", "threads")


def add_stage2_commands(add: Add) -> None:
    """Register the commands.

    Args:
        add: makes the parser of one command from its name, function, help text and shared options.
    """
    reader = "train the reader of generated images"
    classifier = add("classifier", _classifier, reader, *_MEASURE, "seed", "steps", "bf16")
    classifier.add_argument("--settings", help="settings by name (default: the preset's)")
    _add_run_options(classifier)
    gpt = "train the GPT on one arm's tokens"
    stage2 = add("stage2", _stage2, gpt, *_MEASURE, "compile", "seed", "steps", "bf16")
    stage2.set_defaults(together=True)
    _add_arm(stage2)
    _add_run_options(stage2)
    measured = "measure tokenizers and the GPTs on their tokens, under one or several rules of decoding"
    evaluate = add("evaluate", _evaluate, measured, *_MEASURE, "seed", "bf16", "perceptual")
    _add_arm(evaluate, "which tokenizer (default: every finished run, of every seed)")
    evaluate.add_argument("--stage2-steps", type=int, help="optimizer steps of the GPT, if not the preset's")
    evaluate.add_argument(
        "--rules", nargs="+", default=DEFAULT_RULES, metavar="RULE", help=f"{', '.join(RULES)} or other numbers"
    )
    evaluate.add_argument("--tokenizer-alone", action="store_true", help="measure only reconstructions")
    evaluate.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    share = add("publish", _publish, "copy the weights of one arm, in half precision", *WHERE, "seed")
    _add_arm(share)
    share.add_argument("--into", type=Path, required=True, help="folder to create")


def classifier_folder(out: Path) -> Path:
    """Return where the classifier of the results in ``out`` lies."""
    return out / "classifier"


def _add_arm(parser: argparse.ArgumentParser, optional: str | None = None) -> None:
    parser.add_argument("--arm", choices=tuple(ARMS), required=not optional, help=optional or "which tokenizer")
    parser.add_argument("--train-images", type=int, help="size of the GPT's training set (default: the preset's)")


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume", action="store_true", help="resume from the checkpoint, if there is one")
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)


def _classifier(options: argparse.Namespace) -> None:
    from examples.te_vqgan.classifier.trainer import CLASSIFIERS, train_classifier
    from examples.te_vqgan.data.sources import load_digits
    from examples.te_vqgan.runs.checks import require_choice
    from examples.te_vqgan.runs.provenance import command_line

    name = options.settings or options.preset
    require_choice("settings" if options.settings else "preset", name, tuple(CLASSIFIERS))
    changes = {name: getattr(options, name) for name in ("seed", "steps", "bf16")}
    changes["data"] = options.data or PRESETS[options.preset].data
    given = {name: value for name, value in changes.items() if value is not None}
    settings = dataclasses.replace(CLASSIFIERS[name], **given)
    folder = classifier_folder(out_folder(options))
    trained = train_classifier(
        settings,
        folder,
        load_digits(settings.data, options.data_dir),
        execution=execution(options),
        resume=options.resume,
        stop=_orphaned(options),
        progress=options.parent is None,
        command=command_line(options.words),
    )
    _tell(folder, trained)


def _stage2(options: argparse.Namespace) -> None:
    from examples.te_vqgan.data.sources import load_digits
    from examples.te_vqgan.runs.provenance import command_line
    from examples.te_vqgan.stage2.settings import stage2_settings_for
    from examples.te_vqgan.stage2.train import stage2_folder, train_stage2

    names = ("seed", "steps", "bf16", "train_images")
    settings = stage2_settings_for(options.preset, {name: getattr(options, name) for name in names})
    tokenizer = _tokenizer_folder(options, settings.seed)
    trained = train_stage2(
        settings,
        tokenizer,
        load_digits(_data(options), options.data_dir),
        execution=execution(options),
        resume=options.resume,
        stop=_orphaned(options),
        progress=options.parent is None,
        command=command_line(options.words),
    )
    _tell(stage2_folder(tokenizer, settings), trained)


def _evaluate(options: argparse.Namespace) -> None:
    from examples.te_vqgan.data.sources import load_digits
    from examples.te_vqgan.runs.checks import require
    from examples.te_vqgan.stage2.rules import rule_named
    from examples.te_vqgan.stage2.settings import stage2_settings_for

    for rule in options.rules:
        # A wrong name shows before anything is measured; sizes do not matter to it.
        rule_named(rule, 1, 1)
    source = load_digits(_data(options), options.data_dir)
    if options.arm is None:
        for name in ("seed", "stage2_steps", "train_images"):
            require(getattr(options, name) is None, name, "unset without an arm", getattr(options, name))
        _evaluate_all(options, source)
        return
    seed = PRESETS[options.preset].seed if options.seed is None else options.seed
    changes = {"seed": seed, "steps": options.stage2_steps, "train_images": options.train_images}
    alone = options.tokenizer_alone
    settings = None if alone else stage2_settings_for(options.preset, changes | {"bf16": options.bf16})
    tokenizer = _tokenizer_folder(options, seed)
    _tell(tokenizer, _evaluate_one(options, source, tokenizer, settings))


def _evaluate_all(options: argparse.Namespace, source: DigitSource) -> None:
    """Measure every run in the folder of results that is finished, a seed after the other."""
    from examples.te_vqgan.reports.results import finished_gpts, finished_runs, tell_unfinished
    from examples.te_vqgan.runs.checks import require
    from examples.te_vqgan.runs.files import read_json_object
    from examples.te_vqgan.stage2.settings import from_dict

    tell_unfinished(out_folder(options))
    folders = finished_runs(out_folder(options))
    require(bool(folders), "out", "a folder with finished runs", str(out_folder(options)))
    for tokenizer in folders:
        trained = [] if options.tokenizer_alone else finished_gpts(tokenizer)
        chosen: list[Stage2Settings | None] = [
            from_dict(read_json_object(folder / "settings.json")) for folder in trained
        ]
        measured = [_evaluate_one(options, source, tokenizer, settings) for settings in chosen or [None]]
        _tell(tokenizer, any(measured))


def _evaluate_one(
    options: argparse.Namespace, source: DigitSource, tokenizer: Path, settings: Stage2Settings | None
) -> bool:
    """Measure a tokenizer and, if there are ``settings`` of one, the GPT on its tokens under every rule."""
    from examples.te_vqgan.runs.provenance import command_line
    from examples.te_vqgan.stage2.evaluate import evaluate_gpt, evaluate_tokenizer

    where, command = execution(options), command_line(options.words)
    reader = classifier_folder(out_folder(options))
    measured = evaluate_tokenizer(
        tokenizer, reader, source, execution=where, perceptual=options.perceptual, command=command
    )
    if settings is None:
        return measured
    for rule in options.rules:
        measured |= evaluate_gpt(
            settings,
            tokenizer,
            reader,
            source,
            rule=rule,
            execution=where,
            progress=options.parent is None,
            command=command,
        )
    return measured


def _publish(options: argparse.Namespace) -> None:
    from examples.te_vqgan.runs.provenance import command_line
    from examples.te_vqgan.stage2.publish import publish
    from examples.te_vqgan.stage2.settings import stage2_settings_for

    seed = PRESETS[options.preset].seed if options.seed is None else options.seed
    settings = stage2_settings_for(options.preset, {"seed": seed, "train_images": options.train_images})
    out = out_folder(options)
    size = publish(
        settings,
        _tokenizer_folder(options, seed),
        classifier_folder(out),
        options.into,
        command=command_line(options.words),
    )
    print(f"{options.into}: {size / 2**20:.1f} MiB of weights.")


def _data(options: argparse.Namespace) -> str:
    return str(options.data or PRESETS[options.preset].data)


def _tokenizer_folder(options: argparse.Namespace, seed: int) -> Path:
    from examples.te_vqgan.reports.results import run_folder

    return run_folder(out_folder(options), options.arm, seed)


def _orphaned(options: argparse.Namespace) -> Callable[[int], bool] | None:
    return None if options.parent is None else lambda _: os.getppid() != options.parent


def _tell(folder: Path, worked: bool) -> None:
    print(f"{folder}: {'finished' if worked else 'was finished before, nothing to do'}.")
