"""Options after construction: changes are checked as by the constructor or refused, and print shows them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from te_quant import FSQ, LFQ, ProductQuantizer, ResidualVectorQuantizer, SimVQ, VectorQuantizer
from tests.helpers import exactly, plain_quantizer, plain_residual
from tests.unit.quantizer_cases import state_of

BUILD: dict[str, Callable[..., Any]] = {
    "vq": lambda **own: VectorQuantizer(8, 4, **{"orthogonal_reg": 1.0, **own}),
    "vq-gradient": lambda **own: plain_quantizer(8, 4, **own),
    "rvq": lambda **own: ResidualVectorQuantizer(8, 4, 2, **own),
    "stages": lambda **own: ResidualVectorQuantizer(stages=[FSQ((3, 3)), VectorQuantizer(8, 2)], **own),
    "sim": lambda **own: SimVQ(8, 4, **own),
    "fsq": lambda **own: FSQ((3, 3, 5), **own),
    "lfq": lambda **own: LFQ(5, **own),
    "lfq-large": lambda **own: LFQ(30, **{"diversity_weight": 0.0, **own}),
}
WEIGHTS = {
    "vq": ("commitment_weight", "orthogonal_reg", "temperature", "decay", "revival_threshold"),
    "vq-gradient": ("commitment_weight", "codebook_weight", "orthogonal_reg", "temperature", "decay"),
    "rvq": ("commitment_weight", "orthogonal_reg", "decay", "revival_threshold"),
    "sim": ("commitment_weight", "decay"),
    "lfq": ("commitment_weight", "entropy_weight", "diversity_weight", "temperature"),
}
OTHERS: list[tuple[str, str, Any]] = [
    ("vq", "codebook_weight", 0.5),
    ("vq", "decay", 1.0),
    ("vq", "revival_threshold", 1.0),
    ("vq", "orthogonal_active_only", 1),
    ("vq-gradient", "revival_threshold", 0.5),
    ("rvq", "decay", 2.0),
    ("rvq", "quantizer_dropout", 2.0),
    ("rvq", "loss_weights", (1.0, -1.0)),
    ("rvq", "loss_weights", (1.0,)),
    ("stages", "gradient_estimator", "x"),
    ("sim", "decay", 1.0),
    ("lfq", "temperature", 0.0),
    ("lfq", "entropy_group_dim", 6),
    ("lfq-large", "diversity_weight", 1.0),
    *((name, "gradient_estimator", "x") for name in ("vq", "vq-gradient", "rvq", "sim")),
    *((name, option, "x") for name in BUILD if name != "stages" for option in ("channel_dim", "nonfinite")),
    *((name, option, bad) for name, all_of in WEIGHTS.items() for option in all_of for bad in (-1, math.nan, "1")),
]


@pytest.mark.parametrize(("name", "option", "value"), OTHERS)
def test_assignments_refuse_what_the_constructor_refuses(name: str, option: str, value: Any) -> None:
    """In the same words, and the option stays as it was, in the parts too."""
    with pytest.raises((ValueError, TypeError), match=r"^[a-z_]+(\[1\])? must be .+, got .+\.$") as refused:
        BUILD[name](**{option: value})
    quantizer = BUILD[name]()
    before = [part.options() for part in quantizer.modules() if hasattr(part, "options")]
    with pytest.raises(refused.type, match=exactly(str(refused.value))):
        setattr(quantizer, option, value)
    assert [part.options() for part in quantizer.modules() if hasattr(part, "options")] == before


@pytest.mark.parametrize(("name", "option"), [(name, option) for name in WEIGHTS for option in WEIGHTS[name]])
def test_weights_may_change(name: str, option: str) -> None:
    """Negative control: a value that the constructor takes, of numpy too, is as if built with it."""
    quantizer, built = BUILD[name](), BUILD[name](**({} if option == "revival_threshold" else {option: 0.25}))
    value = 0.01 if option == "revival_threshold" else torch.tensor(0.25).numpy()[()]
    setattr(quantizer, option, value)
    assert quantizer.options() == built.options()
    assert type(getattr(quantizer, option)) is float


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("vq", "num_codes", 9),
        ("vq", "code_dim", 5),
        ("vq", "metric", "cosine"),
        ("vq", "metric", "foo"),
        ("vq", "codebook_update", "gradient"),
        ("vq", "orthogonal_max_codes", 3),
        ("rvq", "codebook_update", "gradient"),
        ("rvq", "shared_codebook", True),
        ("rvq", "num_quantizers", 3),
        ("sim", "num_codes", 9),
        ("fsq", "levels", (3, 3, 7)),
        ("lfq", "code_dim", 6),
        ("lfq", "spherical", True),
    ],
)
def test_fixed_options_are_refused(name: str, option: str, value: Any) -> None:
    """Buffers or codes depend on them. The value that they have is no change."""
    quantizer = BUILD[name]()
    own = getattr(quantizer, option)
    message = (
        f"{option} must be {own!r}, as the quantizer was built, got {value!r}; build another quantizer with it."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        setattr(quantizer, option, value)
    setattr(quantizer, option, own)
    assert getattr(quantizer, option) == own


def test_the_groups_of_a_product_are_fixed() -> None:
    """Also where one quantizer serves all."""
    quantizer = ProductQuantizer([FSQ((3, 3))], num_groups=2)
    with pytest.raises(ValueError, match="num_groups must be 2, as the quantizer was built, got 3"):
        quantizer.num_groups = 3


@pytest.mark.parametrize(
    "build", [VectorQuantizer, lambda *sizes, **own: ResidualVectorQuantizer(*sizes, 2, **own)]
)
def test_revival_needs_what_the_constructor_builds(build: Callable[..., Any]) -> None:
    """The cure that the message names works; a quantizer that was built to revive may stop and go on."""
    quantizer = build(8, 4, revival_threshold=0.0)
    quantizer(torch.randn(50, 4))
    message = (
        "revival_threshold must be 0, as the quantizer was built, which keeps no latents to replace codes by, got "
        "0.01; build another quantizer with it and load this one's state_dict."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        quantizer.revival_threshold = 0.01
    assert quantizer.revival_threshold == 0
    other = build(8, 4, revival_threshold=0.01)
    other.load_state_dict(quantizer.state_dict())
    for threshold in (0.01, 0.0, 0.02):
        other.revival_threshold = threshold
        other(torch.randn(50, 4))
    assert other.eval().options()["revival_threshold"] == 0.02


@pytest.mark.parametrize("subset", [{"orthogonal_active_only": True}, {"orthogonal_max_codes": 3}])
@pytest.mark.parametrize("name", ["vq", "vq-gradient"])
def test_the_penalty_may_fade_in_and_out(name: str, subset: dict[str, Any]) -> None:
    """At 0 it is as if the options of its subset were not there, in files too; above 0 (the control) it is not."""
    torch.manual_seed(1)
    start = BUILD[name](orthogonal_reg=0.0, **subset)
    torch.manual_seed(1)
    plain = BUILD[name](orthogonal_reg=0.0)
    changed = copy.deepcopy(start)
    changed.orthogonal_reg = 5.0
    latents = torch.randn(40, 4)
    assert start(latents).loss == plain(latents).loss < changed(latents).loss
    changed.orthogonal_reg = 0.0
    assert changed(latents).regularization_loss == 0
    for quantizer in (start, plain, changed):
        quantizer.eval()
    assert torch.equal(start.codebook, plain.codebook)
    rebuilt = type(changed)(**changed.options())
    rebuilt.load_state_dict(changed.state_dict())
    assert torch.equal(rebuilt.eval()(latents).indices, changed(latents).indices)


@pytest.mark.parametrize("option", ["entropy_weight", "diversity_weight"])
def test_the_entropy_may_fade_in_and_out(option: str) -> None:
    """At 0 it is as if the groups were not there; above 0 (the control) it is not, and large codes need them."""
    start = LFQ(28, entropy_group_dim=14, **{option: 0.0})  # type: ignore[arg-type]
    plain = LFQ(28, **{option: 0.0})  # type: ignore[arg-type]
    latents = torch.randn(40, 28)
    assert start(latents).loss == plain(latents).loss
    with pytest.raises(
        ValueError, match="entropy_group_dim must be an int <= 24 for the entropies of code_dim=28 channels"
    ):
        setattr(plain, option, 0.1)
    plain.entropy_group_dim = 14
    for quantizer in (start, plain):
        setattr(quantizer, option, 0.1)
    assert start(latents).loss == plain(latents).loss > LFQ(28, **{option: 0.0})(latents).loss  # type: ignore[arg-type]
    setattr(start, option, 0.0)
    assert LFQ(**start.options())(latents).loss == start(latents).loss < plain(latents).loss


def test_a_quantizer_that_stopped_reviving_may_be_reset() -> None:
    """What a new one lacks becomes zero; a frozen one is left alone."""
    quantizer = VectorQuantizer(8, 4)
    quantizer(torch.randn(20, 4))
    quantizer.revival_threshold = 0.0
    quantizer.reset_parameters()
    assert not quantizer.pending_rows.any()
    assert float(quantizer.codebook.abs().max()) <= 1 / 8
    with pytest.raises(RuntimeError, match="reset_parameters must be called on a quantizer that is not frozen"):
        quantizer.freeze().reset_parameters()


@pytest.mark.parametrize("option", ["decay", "orthogonal_reg", "revival_threshold", "commitment_weight"])
def test_levels_follow_the_whole(option: str) -> None:
    """After the change a residual quantizer moves as one that was built with it; without it (the control) not."""
    value, latents = 0.95, torch.randn(3, 60, 4)
    torch.manual_seed(1)
    changed = ResidualVectorQuantizer(8, 4, 2)
    built = ResidualVectorQuantizer(8, 4, 2, **{option: value})  # type: ignore[arg-type]
    built.load_state_dict(changed.state_dict())
    same = copy.deepcopy(changed)
    setattr(changed, option, value)
    losses = {}
    for name, quantizer in {"changed": changed, "built": built, "same": same}.items():
        losses[name] = [quantizer(batch).loss for batch in latents]
        quantizer.eval()
    assert losses["changed"] == losses["built"]
    states = [state_of(quantizer) for quantizer in (changed, built, same)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    moved = not all(torch.equal(states[0][name], states[2][name]) for name in states[0])
    assert moved or losses["changed"] != losses["same"]


def test_given_stages_are_changed_one_by_one() -> None:
    """An attribute of the whole would have no effect."""
    quantizer = BUILD["stages"]()
    message = "decay must be set on each of quantizer.stages, which have their own, got 0.5."
    with pytest.raises(ValueError, match=exactly(message)):
        quantizer.decay = 0.5
    quantizer.stages[1].decay = 0.5
    assert quantizer.stages[1].decay == 0.5


@pytest.mark.parametrize(
    ("option", "value", "cure"),
    [
        ("commitment_weight", 50.0, "set it on the ResidualVectorQuantizer"),
        ("orthogonal_reg", 1.0, "set it on the ResidualVectorQuantizer"),
        ("gradient_estimator", "rotation_trick", "set it on the ResidualVectorQuantizer"),
        ("temperature", 100.0, "pass stages to ResidualVectorQuantizer to give them options of their own"),
        (
            "orthogonal_active_only",
            True,
            "pass stages to ResidualVectorQuantizer to give them options of their own",
        ),
    ],
)
@pytest.mark.parametrize("wrap", [copy.copy, lambda whole: ProductQuantizer([whole]).quantizers[0], copy.deepcopy])
def test_levels_refuse_what_only_the_whole_reads(option: str, value: Any, cure: str, wrap: Callable) -> None:
    """It would have no effect. The value that they have, and options that levels do read, are taken."""
    whole = wrap(BUILD["rvq"]())
    stage = whole.stages[1]
    own = getattr(stage, option)
    message = (
        f"{option} must be {own!r} in a level that a ResidualVectorQuantizer has built, got {value!r}; {cure}."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        setattr(stage, option, value)
    setattr(stage, option, own)
    stage.decay = 0.5
    if hasattr(whole, option):
        setattr(whole, option, value)
        assert getattr(stage, option) == value
    given = ResidualVectorQuantizer(stages=list(BUILD["rvq"]().stages))
    setattr(given.stages[1], option, own)


@pytest.mark.parametrize(
    ("build", "option", "expected"),
    [
        (lambda: ProductQuantizer([VectorQuantizer(8, 4), FSQ((3, 3))]), "decay", "quantizer.quantizers"),
        (lambda: ProductQuantizer([BUILD["rvq"]()]), "orthogonal_reg", "quantizer.quantizers"),
        (BUILD["stages"], "temperature", "quantizer.stages"),
        (BUILD["stages"], "levels", "quantizer.stages"),
        (BUILD["rvq"], "temperature", ""),
        (BUILD["rvq"], "metric", ""),
    ],
)
def test_a_whole_refuses_options_that_only_its_parts_have(build: Callable, option: str, expected: str) -> None:
    """They would be attributes without effect; an attribute of another name (the control) is the user's own."""
    quantizer = build()
    expected = (
        f"set on each of {expected}, which have their own"
        if expected
        else (f"left out of a quantizer that builds its levels; build another with stages=[... {option}=...]")
    )
    message = f"{option} must be {expected}, got 0.5."
    with pytest.raises(ValueError, match=exactly(message)):
        setattr(quantizer, option, 0.5)
    assert not hasattr(quantizer, option)
    quantizer.label = 0.5
    assert quantizer.label == 0.5


class Small(ResidualVectorQuantizer):
    """Three small codebooks, whose sizes a user of it cannot choose."""

    def __init__(self, width: int) -> None:
        super().__init__(num_codes=8, code_dim=width, num_quantizers=3)


class Halves(ProductQuantizer):
    """Two codebooks, one for each half of the channels."""

    def __init__(self, width: int) -> None:
        super().__init__([VectorQuantizer(8, width // 2) for _ in range(2)])


class Plain(VectorQuantizer):
    """A codebook that does not keep its only option as an attribute."""

    def __init__(self, width: int, mood: str = "good") -> None:
        super().__init__(num_codes=8, code_dim=width)


@pytest.mark.parametrize(
    ("kind", "same"),
    [
        (Small, lambda: ResidualVectorQuantizer(8, 4, 3)),
        (Halves, lambda: ProductQuantizer([VectorQuantizer(8, 2), VectorQuantizer(8, 2)])),
    ],
)
def test_a_subclass_may_have_other_options(kind: Callable, same: Callable) -> None:
    """It computes what its base class does, and refuses the same options; only checkpoints need them all."""
    torch.manual_seed(1)
    quantizer = kind(4)
    torch.manual_seed(1)
    base = same()
    latents = torch.randn(2, 4, 5, 5)
    for whole in (quantizer, base):
        whole(latents)
    assert torch.equal(quantizer(latents).codes, base(latents).codes)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(quantizer.buffers(), base.buffers(), strict=True))
    with pytest.raises(ValueError, match=r"temperature must be .*, got 0\.5\."):
        quantizer.temperature = 0.5
    quantizer.label = 0.5
    assert copy.deepcopy(quantizer).label == 0.5
    with pytest.raises(AttributeError, match=r"must keep every option .* set self\.width in the constructor\."):
        quantizer.options()


@pytest.mark.parametrize(
    "build", [lambda parts: ResidualVectorQuantizer(stages=parts), lambda parts: ProductQuantizer(parts)]
)
def test_parts_need_not_keep_their_options(build: Callable) -> None:
    """Attributes of the whole are set without reading theirs; an option of theirs is refused all the same."""
    quantizer = build([Plain(2), Plain(2)])
    quantizer(torch.randn(3, quantizer.code_dim))
    quantizer.label = 0.5
    for option in ("mood", "temperature"):
        with pytest.raises(
            ValueError, match=rf"^{option} must be set on each of quantizer\.\w+, which have their own"
        ):
            setattr(quantizer, option, 0.5)


def test_layouts_are_those_of_the_parts() -> None:
    """And what is done about NaN; a quantizer without a gradient estimator gets none."""
    quantizer = ProductQuantizer([plain_residual(8, 3, 2), FSQ((3, 3))])
    quantizer.channel_dim, quantizer.nonfinite = -1, "skip"
    parts = [part for part in quantizer.modules() if hasattr(part, "options")]
    assert {(part.channel_dim, part.nonfinite) for part in parts} == {(-1, "skip")}
    rebuilt = ProductQuantizer(**quantizer.options())
    assert rebuilt(torch.randn(2, 7, 5)).indices.shape == (2, 7, 3)
    stages = BUILD["stages"]()
    stages.gradient_estimator = "rotation_trick"
    assert stages.stages[1].gradient_estimator == "rotation_trick"
    assert not hasattr(stages.stages[0], "gradient_estimator")


def test_dropout_may_start_later() -> None:
    """Then indices may be -1, which the quantizer says."""
    quantizer = BUILD["rvq"]()
    assert quantizer.lowest_index == 0
    quantizer.quantizer_dropout = True
    assert quantizer.lowest_index == -1
    assert int(quantizer(torch.randn(40, 4)).indices.min()) == -1
    quantizer.quantizer_dropout = False
    assert quantizer.lowest_index == 0


@pytest.mark.parametrize(
    ("quantizer", "text"),
    [
        (VectorQuantizer(8, 4), "VectorQuantizer(num_codes=8, code_dim=4)"),
        (
            VectorQuantizer(
                8,
                4,
                metric="cosine",
                codebook_update="gradient",
                commitment_weight=0.25,
                gradient_estimator="rotation_trick",
                decay=0.99,
                revival_threshold=0.0,
                channel_dim=-1,
            ),
            "VectorQuantizer(num_codes=8, code_dim=4, metric='cosine', codebook_update='gradient', "
            "commitment_weight=0.25, gradient_estimator='rotation_trick', decay=0.99, revival_threshold=0.0, "
            "channel_dim=-1)",
        ),
        (SimVQ(8, 4, decay=0.5), "SimVQ(num_codes=8, code_dim=4, decay=0.5)"),
        (FSQ([3, 5], nonfinite="skip"), "FSQ(levels=(3, 5), nonfinite='skip')"),
        (LFQ(4, entropy_weight=0.2), "LFQ(code_dim=4, entropy_weight=0.2)"),
        (
            ResidualVectorQuantizer(8, 4, 2, decay=0.5),
            "ResidualVectorQuantizer(\n  num_codes=8, code_dim=4, num_quantizers=2, decay=0.5\n"
            "  (stages): ModuleList(\n    (0-1): 2 x VectorQuantizer(num_codes=8, code_dim=4, decay=0.5)\n  )\n)",
        ),
        (
            ProductQuantizer([FSQ((3, 5))], num_groups=2),
            "ProductQuantizer(\n  num_groups=2\n  (quantizers): ModuleList(\n    (0): FSQ(levels=(3, 5))\n  )\n)",
        ),
    ],
)
def test_print_shows_options_beyond_their_defaults(quantizer: Any, text: str) -> None:
    """What one compares after loading or migrating; an option that is not named has its default."""
    assert repr(quantizer) == text


def test_print_of_options_that_are_no_plain_attributes() -> None:
    """A parameter of the name of an option, and an option that was not kept."""

    class Own(FSQ):
        def __init__(self, levels: Any, scale: float = 1.0, lost: int = 3) -> None:
            super().__init__(levels)
            self.scale = torch.nn.Parameter(torch.tensor([scale, 2 * scale]))

    assert repr(Own((3, 5), 2.0, 4)) == "Own(levels=(3, 5))"
