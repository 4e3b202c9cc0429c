"""What every quantizer promises, as checks that a stranger's class can run: :func:`check_quantizer`.

Shape letters: B batch, C code size, h w token grid, K codes, N latent vectors, Q indices per vector.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from te_quant.quantizers import Quantizer, QuantizerOutput
from te_quant.quantizers.base import LATENT_SHAPES
from te_quant.testing._surroundings import fixed_surroundings, seed_cpu

__all__ = ["QUANTIZER_CHECKS", "QuantizerFactory", "check_quantizer"]

QuantizerFactory = Callable[..., Quantizer]

# (channel_dim, shape with C left as -1)
_SHAPES: tuple[tuple[int, tuple[int, ...]], ...] = (
    (1, (3, -1, 4, 5)),
    (1, (3, -1, 7)),
    (1, (9, -1)),
    (1, (2, -1, 2, 3, 2)),
    (-1, (3, 7, -1)),
    (-1, (9, -1)),
    (-1, (2, 3, 4, -1)),
    (-1, (2, 2, 3, 2, -1)),
)
_EMPTY_SHAPES: tuple[tuple[int, tuple[int, ...]], ...] = (
    (1, (0, -1, 4, 5)),
    (1, (2, -1, 4, 0)),
    (1, (0, -1)),
    (-1, (0, 7, -1)),
    (-1, (3, 0, -1)),
    (-1, (2, 2, 0, 2, -1)),
)
_IMAGE = (3, -1, 4, 5)
_NOT_FINITE = (math.nan, math.inf, -math.inf)
_SEED = 0


def check_quantizer(factory: QuantizerFactory) -> None:
    """Hold a quantizer to everything that the quantizers of this library promise.

    Runs all of :data:`QUANTIZER_CHECKS` on the CPU, in a few seconds. Default dtype and device, ``no_grad``,
    autocast and the global random state (also that of accelerators) do not matter, and are as before afterwards.
    To see one result per check, parametrize your test over :data:`QUANTIZER_CHECKS` instead.

    Args:
        factory: builds the quantizer: a class whose other arguments have defaults, or a ``functools.partial`` of
            one. It must accept ``channel_dim`` and ``nonfinite`` by keyword.

    Raises:
        AssertionError: a promise is broken; the message names it and says what was found.

    Example:
        >>> from functools import partial
        >>> from te_quant import FSQ
        >>> from te_quant.testing import check_quantizer
        >>> check_quantizer(partial(FSQ, (8, 5, 5)))
    """
    for check in QUANTIZER_CHECKS.values():
        check(factory)


def _promise(holds: bool, promise: str, found: str) -> None:
    if not holds:
        raise AssertionError(f"broken promise: {promise}; {found}.")


def _check(
    promise: str,
) -> Callable[[Callable[[str, QuantizerFactory], None]], Callable[[QuantizerFactory], None]]:
    """Name what a check looks for, give it randomness of its own, and report what it raises."""

    def decorate(check: Callable[[str, QuantizerFactory], None]) -> Callable[[QuantizerFactory], None]:
        @functools.wraps(check)
        def run(factory: QuantizerFactory) -> None:
            with fixed_surroundings(_SEED):
                try:
                    check(promise, factory)
                except AssertionError:
                    raise
                except Exception as error:
                    found = f"{type(error).__name__} '{error}' was raised"
                    raise AssertionError(f"broken promise: {promise}; {found}.") from error

        return run

    return decorate


def _build(
    factory: QuantizerFactory, *, training: bool = False, spread: bool = True, **options: object
) -> Quantizer:
    """Build a quantizer whose codebook, if k-means can start it, is as wide as the latents."""
    quantizer = factory(**options).train(training)
    start = getattr(quantizer, "kmeans_init", None)
    if spread and start is not None:
        start(torch.randn(64, quantizer.code_dim), iterations=2)
    return quantizer


def _latents(quantizer: Quantizer, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    sizes = [quantizer.code_dim if size == -1 else size for size in shape]
    return torch.randn(sizes, dtype=torch.float64).to(dtype)


def _token_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != -1)


def _index_shape(quantizer: Quantizer, shape: tuple[int, ...]) -> tuple[int, ...]:
    behind = () if quantizer.num_quantizers is None else (quantizer.num_quantizers,)
    return _token_shape(shape) + behind


def _tokens(quantizer: Quantizer, latents: Tensor) -> Tensor:
    """Latents with their channels last."""
    return latents.movedim(quantizer.channel_dim, -1)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def _same_state(module: nn.Module, state: dict[str, Tensor]) -> bool:
    found = module.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def _where(quantizer: Quantizer, shape: tuple[int, ...]) -> str:
    mode = "training" if quantizer.training else "evaluation"
    sizes = tuple(quantizer.code_dim if size == -1 else size for size in shape)
    return f"in {mode}, latents of shape {sizes}, channel_dim={quantizer.channel_dim}"


def _draws(quantizer: Quantizer, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a training step depends on randomness."""
    latents = _latents(quantizer, (64, -1), dtype)
    indices = []
    for seed in (1, 2):
        seed_cpu(seed)
        twin = copy.deepcopy(quantizer).train()
        twin(latents)
        indices.append((twin(latents).indices, _state(twin)))
    return not (torch.equal(indices[0][0], indices[1][0]) and _equal_states(indices[0][1], indices[1][1]))


def _equal_states(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@contextmanager
def _refused(promise: str, error: type[Exception], start: str) -> Iterator[None]:
    wanted = f"{error.__name__} '{start}'"
    try:
        yield
    except Exception as refusal:
        fits = type(refusal) is error and str(refusal).startswith(start)
        if not fits:
            found = f"{type(refusal).__name__} '{refusal}'"
            raise AssertionError(f"broken promise: {promise}; {wanted} was expected, got {found}.") from refusal
    else:
        _promise(False, promise, f"{wanted} was expected, got no error")


@_check("it is a te_quant.Quantizer that keeps every option as an attribute of the same name")
def _is_a_quantizer(promise: str, factory: QuantizerFactory) -> None:
    for channel_dim in (1, -1):
        quantizer = factory(channel_dim=channel_dim)
        _promise(isinstance(quantizer, Quantizer), promise, f"found a {type(quantizer).__name__}")
        _promise(quantizer.channel_dim == channel_dim, promise, f"channel_dim is {quantizer.channel_dim}")
        try:
            quantizer.options()
        except AttributeError as error:
            _promise(False, promise, str(error))
        sizes = (quantizer.num_codes, quantizer.code_dim)
        _promise(all(isinstance(size, int) and size >= 1 for size in sizes), promise, f"K and C are {sizes}")


@_check("forward returns a QuantizerOutput with the documented shapes, dtypes and losses")
def _outputs(promise: str, factory: QuantizerFactory) -> None:
    for training in (True, False):
        quantizer = _build(factory, training=training)
        latents = _latents(quantizer, _IMAGE).requires_grad_()
        output = quantizer(latents)
        where = _where(quantizer, _IMAGE)
        _promise(type(output) is QuantizerOutput, promise, f"found {type(output).__name__} {where}")
        for name, tensor in (("quantized", output.quantized), ("codes", output.codes)):
            fits = tensor.shape == latents.shape and tensor.dtype == latents.dtype == torch.float32
            _promise(fits, promise, f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} {where}")
        shape = tuple(output.indices.shape)
        fits = output.indices.dtype == torch.int64 and shape == _index_shape(quantizer, _IMAGE)
        _promise(fits, promise, f"indices are {output.indices.dtype} of shape {shape} {where}")
        low, high = int(output.indices.min()), int(output.indices.max())
        fits = quantizer.lowest_index <= low and high < quantizer.num_codes
        _promise(fits, promise, f"indices lie in [{low}, {high}] with num_codes={quantizer.num_codes} {where}")
        for name in ("loss", "codebook_loss", "commitment_loss", "regularization_loss"):
            term = getattr(output, name).detach()
            fits = term.shape == () and bool(term.isfinite()) and float(term) >= 0
            _promise(fits, promise, f"{name} is {term} and not one finite number >= 0 {where}")
        total = output.codebook_loss + output.commitment_loss + output.regularization_loss
        _promise(torch.equal(output.loss, total), promise, f"loss {output.loss} is not the sum {total} {where}")
        _promise(not output.codes.requires_grad, promise, f"codes carry a gradient {where}")


@_check("decode(indices), codes and quantized are equal bit for bit")
def _decoding(promise: str, factory: QuantizerFactory) -> None:
    for training in (True, False):
        for channel_dim, shape in _SHAPES:
            quantizer = _build(factory, training=training, channel_dim=channel_dim)
            for step in range(3):
                output = quantizer(_latents(quantizer, shape).requires_grad_())
                where = f"after step {step + 1} {_where(quantizer, shape)}"
                found = tuple(output.indices.shape)
                _promise(found == _index_shape(quantizer, shape), promise, f"indices are of shape {found} {where}")
                decoded = quantizer.decode(output.indices)
                _promise(torch.equal(decoded, output.codes), promise, f"decode(indices) is not codes {where}")
                _promise(torch.equal(output.quantized, output.codes), promise, f"quantized is not codes {where}")
                narrow = quantizer.decode(output.indices.int())
                _promise(torch.equal(narrow, output.codes), promise, f"int32 indices decode otherwise {where}")


@_check("latents in half precision, under autocast or not, are computed in float32 and returned as they came")
def _half_latents(promise: str, factory: QuantizerFactory) -> None:
    for training in (True, False):
        for half, automatic in itertools.product((torch.bfloat16, torch.float16), (True, False)):
            quantizer = _build(factory, training=training)
            for dtype in (torch.float32, half):
                latents = _latents(quantizer, _IMAGE, dtype).requires_grad_()
                with torch.autocast("cpu", dtype=half, enabled=automatic):
                    output = quantizer(latents)
                    inside = quantizer.decode(output.indices)
                where = f"for {dtype} {'under' if automatic else 'outside of'} autocast to {half}"
                where = f"{where} {_where(quantizer, _IMAGE)}"
                _promise(output.codes.dtype == torch.float32, promise, f"codes are {output.codes.dtype} {where}")
                equal = torch.equal(inside, output.codes) and torch.equal(output.quantized, output.codes.to(dtype))
                equal = equal and torch.equal(quantizer.decode(output.indices), output.codes)
                _promise(equal, promise, f"decode(indices), codes and quantized are not the same numbers {where}")
                wide = copy.deepcopy(quantizer).eval()(latents.detach().float())
                equal = not training and not torch.equal(wide.codes, output.codes)
                _promise(not equal, promise, f"the codes are not those of the same numbers in float32 {where}")
                output.quantized.sum().backward()
                gradient = latents.grad
                fits = output.quantized.dtype == dtype and gradient is not None and gradient.dtype == dtype
                _promise(fits, promise, f"quantized or the gradient have not the latents' dtype {where}")


@_check("a module converted to another dtype takes latents of that dtype, stays finite and bit-equal")
def _precisions(promise: str, factory: QuantizerFactory) -> None:
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        quantizer = _build(factory, training=True).to(dtype)
        for step in range(3):
            output = quantizer(_latents(quantizer, _IMAGE, dtype).requires_grad_())
            output.loss.backward()
            where = f"for {dtype} after step {step + 1}"
            fits = output.quantized.dtype == dtype and quantizer.dtype in (None, output.codes.dtype)
            _promise(fits, promise, f"codes are {output.codes.dtype}, quantized {output.quantized.dtype} {where}")
            _promise(bool(output.loss.isfinite()), promise, f"the loss is {output.loss.item()} {where}")
            equal = torch.equal(quantizer.decode(output.indices), output.codes)
            equal = equal and torch.equal(output.quantized, output.codes.to(dtype))
            _promise(equal, promise, f"decode(indices), codes and quantized are not the same bits {where}")


@_check("tokens are quantized independently of where they lie")
def _token_shifts(promise: str, factory: QuantizerFactory) -> None:
    quantizer = _build(factory).double()
    for shape, shift in (((2, -1, 5, 6), (1, 0)), ((2, -1, 5, 6), (3, -2)), ((1, -1, 1, 4), (0, 1))):
        latents = _latents(quantizer, shape, torch.float64)
        before, after = quantizer(latents), quantizer(latents.roll(shift, (-2, -1)))
        encoded, moved = quantizer.encode(latents), quantizer.encode(latents.roll(shift, (-2, -1)))
        found = f"after a circular shift of the token grid by {shift}"
        _promise(torch.equal(encoded.roll(shift, (1, 2)), moved), promise, f"indices do not move along {found}")
        for name in ("quantized", "codes"):
            equal = torch.equal(getattr(before, name).roll(shift, (-2, -1)), getattr(after, name))
            _promise(equal, promise, f"{name} do not move along {found}")
        close = torch.allclose(before.loss, after.loss, rtol=1e-12, atol=1e-300)
        _promise(close, promise, f"the loss changes from {before.loss} to {after.loss} {found}")


@_check("the same vectors in any layout give the same indices and codes")
def _layouts(promise: str, factory: QuantizerFactory) -> None:
    first, last = _build(factory, channel_dim=1), factory(channel_dim=-1).eval()
    last.load_state_dict(first.state_dict())
    image = _latents(first, (2, -1, 3, 4))
    c = first.code_dim
    rows = image.permute(0, 2, 3, 1).reshape(24, c)
    expected = first(image)
    views = {
        "(B, C, N)": (first, image.flatten(2)),
        "(B, C, d, h, w)": (first, image.view(2, c, 3, 2, 2)),
        "(N, C)": (first, rows),
        "(B, N, C)": (last, rows.view(2, 12, c)),
        "(B, h, w, C)": (last, rows.view(2, 3, 4, c)),
    }
    for layout, (quantizer, latents) in views.items():
        output = quantizer(latents)
        equal = torch.equal(output.indices.flatten(), expected.indices.flatten())
        _promise(equal, promise, f"{layout} has other indices than (B, C, h, w)")
        codes = output.codes if quantizer is last or layout == "(N, C)" else output.codes.movedim(1, -1)
        equal = torch.equal(codes.reshape(24, c), expected.codes.permute(0, 2, 3, 1).reshape(24, c))
        _promise(equal, promise, f"{layout} has other codes than (B, C, h, w)")
        close = torch.allclose(output.loss, expected.loss, rtol=1e-5)
        _promise(close, promise, f"{layout} has another loss, {output.loss} and not {expected.loss}")


@_check("permuted, strided and expanded latents give what their contiguous copies give")
def _memory_order(promise: str, factory: QuantizerFactory) -> None:
    for channel_dim, shape in _SHAPES:
        quantizer = _build(factory, channel_dim=channel_dim)
        latents = _latents(quantizer, shape)
        backwards = tuple(reversed(range(latents.ndim)))
        views = {
            "permuted": latents.permute(backwards).contiguous().permute(backwards),
            "strided": torch.stack([latents, latents + 9], dim=-1)[..., 0],
        }
        expected = quantizer(latents)
        for kind, view in views.items():
            output = quantizer(view.requires_grad_())
            equal = torch.equal(output.indices, expected.indices) and torch.equal(output.codes, expected.codes)
            _promise(equal, promise, f"{kind} latents give something else {_where(quantizer, shape)}")
            output.quantized.square().sum().backward()
        expanded = latents[:1].expand_as(latents)
        equal = torch.equal(quantizer(expanded).indices, quantizer(expanded.contiguous()).indices)
        _promise(equal, promise, f"expanded latents give something else {_where(quantizer, shape)}")


@_check("contiguous latents give contiguous results, channels-last latents channels-last ones")
def _memory_formats(promise: str, factory: QuantizerFactory) -> None:
    for channel_dim, shape in _SHAPES:
        quantizer = _build(factory, channel_dim=channel_dim)
        latents = _latents(quantizer, shape)
        output = quantizer(latents)
        decoded = quantizer.decode(output.indices)
        for name, tensor in (("quantized", output.quantized), ("codes", output.codes), ("decode", decoded)):
            _promise(tensor.is_contiguous(), promise, f"{name} is not contiguous {_where(quantizer, shape)}")
    quantizer = _build(factory)
    latents = _latents(quantizer, (2, -1, 3, 4)).to(memory_format=torch.channels_last)
    output = quantizer(latents)
    for name, tensor in (("quantized", output.quantized), ("codes", output.codes)):
        fits = tensor.is_contiguous(memory_format=torch.channels_last)
        _promise(fits, promise, f"{name} is not channels-last")


@_check("encode gives the indices of forward in evaluation and changes nothing")
def _encoding(promise: str, factory: QuantizerFactory) -> None:
    quantizer = _build(factory)
    before = _state(quantizer)
    latents = _latents(quantizer, _IMAGE).requires_grad_()
    output = quantizer(latents)
    _promise(torch.equal(quantizer.encode(latents), output.indices), promise, "encode gives other indices")
    _promise(torch.equal(quantizer(latents).indices, output.indices), promise, "a second forward gives others")
    _promise(_same_state(quantizer, before), promise, "forward in evaluation changes the state")
    quantizer.train().encode(latents)
    _promise(_same_state(quantizer, before), promise, "encode in training changes the state")


@_check("gradients reach the latents through quantized, and loss.backward() is valid")
def _gradients(promise: str, factory: QuantizerFactory) -> None:
    for training in (True, False):
        quantizer = _build(factory, training=training)
        latents = _latents(quantizer, _IMAGE).requires_grad_()
        output = quantizer(latents)
        where = _where(quantizer, _IMAGE)
        for name, scalar in (("quantized", output.quantized.square().sum()), ("loss", output.loss)):
            _promise(scalar.requires_grad, promise, f"{name} has no gradient path {where}")
            (gradient,) = torch.autograd.grad(scalar, latents, retain_graph=True, allow_unused=True)
            _promise(gradient is not None, promise, f"{name} does not reach the latents {where}")
            _promise(bool(gradient.isfinite().all()), promise, f"the gradient of {name} is not finite {where}")
            _promise(name == "loss" or bool(gradient.any()), promise, f"the gradient of {name} is zero {where}")


@_check("an empty batch gives empty results, a finite loss and no change of state")
def _empty_batches(promise: str, factory: QuantizerFactory) -> None:
    for training in (True, False):
        for channel_dim, shape in _EMPTY_SHAPES:
            quantizer = _build(factory, training=training, channel_dim=channel_dim)
            before = _state(quantizer)
            latents = _latents(quantizer, shape).requires_grad_()
            output = quantizer(latents)
            where = _where(quantizer, shape)
            fits = output.quantized.shape == output.codes.shape == latents.shape
            fits = fits and tuple(output.indices.shape) == _index_shape(quantizer, shape)
            _promise(fits, promise, f"the results have other shapes {where}")
            distances = (output.codebook_loss.item(), output.commitment_loss.item())
            fits = distances == (0, 0) and bool(output.loss.isfinite())
            _promise(fits, promise, f"the losses are {distances} and {output.loss.item()} {where}")
            (output.loss + output.quantized.sum()).backward()
            gradients = (parameter.grad for parameter in quantizer.parameters())
            finite = all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients)
            _promise(finite and latents.grad is not None, promise, f"the gradients are not finite {where}")
            _promise(_same_state(quantizer, before), promise, f"the state changes {where}")
            _promise(quantizer.encode(latents).shape == output.indices.shape, promise, f"encode fails {where}")
            _promise(quantizer.decode(output.indices).shape == latents.shape, promise, f"decode fails {where}")


@_check("latents of another rank, size, kind, dtype or device are refused by name")
def _wrong_latents(promise: str, factory: QuantizerFactory) -> None:
    for channel_dim, wanted in LATENT_SHAPES.items():
        quantizer = _build(factory, channel_dim=channel_dim)
        c = quantizer.code_dim
        for shape in ((c,), (1, c, 1, 1, 1, c)):
            message = f"latents must be of shape {wanted}, got shape {shape}."
            for method in (quantizer, quantizer.encode):
                with _refused(promise, ValueError, message):
                    method(torch.zeros(shape))
    # No other axis has the size of the codes, or the refusal would propose it.
    other = factory().code_dim + 1
    for channel_dim, wrong, axis in (
        (1, (2, 67, 3, other), 1),
        (-1, (2, other, 67), 2),
        (1, (5, 67), 1),
        (-1, (5, 67), 1),
    ):
        quantizer = _build(factory, channel_dim=channel_dim)
        message = f"latents axis {axis} must be code_dim={quantizer.code_dim}, got 67 (latents shape {wrong})."
        for method in (quantizer, quantizer.encode):
            with _refused(promise, ValueError, message):
                method(torch.zeros(wrong))
    quantizer = _build(factory)
    c = quantizer.code_dim
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64):
        with _refused(promise, TypeError, f"latents must be floating point, got {dtype}."):
            quantizer(torch.zeros(2, c, dtype=dtype))
    with _refused(promise, TypeError, "latents must be a tensor, got list."):
        quantizer([[0.0]])  # type: ignore[arg-type]
    if quantizer.reference is not None:
        with _refused(promise, TypeError, "latents must be torch.float32 as the quantizer, got torch.float64"):
            quantizer(torch.zeros(2, c, dtype=torch.float64))
        with _refused(promise, ValueError, "latents must be on cpu as the quantizer, got meta."):
            quantizer(torch.zeros(2, c, device="meta"))


@_check("indices that belong to no code, and tensors that are no indices, are refused by name")
def _wrong_indices(promise: str, factory: QuantizerFactory) -> None:
    quantizer = _build(factory)
    k = quantizer.num_codes
    behind = _index_shape(quantizer, ())
    for bad in (-2, -k - 2, k, k + 5):
        indices = torch.zeros(3, *behind, dtype=torch.int64)
        indices[1] = bad
        with _refused(promise, ValueError, f"indices must be in [-1, num_codes={k}), got {bad}."):
            quantizer.decode(indices)
    for dtype in (torch.float32, torch.bool, torch.complex64):
        with _refused(promise, TypeError, f"indices must be an integer tensor, got {dtype}."):
            quantizer.decode(torch.zeros(3, *behind, dtype=dtype))
    for shape in (behind, (1, 1, 1, 1, 1, *behind)):
        with _refused(promise, ValueError, "indices must be of shape "):
            quantizer.decode(torch.zeros(shape, dtype=torch.int64))


@_check("latents that are not finite are refused under nonfinite='raise', before anything changes")
def _raised_latents(promise: str, factory: QuantizerFactory) -> None:
    for training in (True, False):
        for bad in _NOT_FINITE:
            quantizer = _build(factory, training=training, nonfinite="raise")
            before = _state(quantizer)
            latents = _latents(quantizer, _IMAGE)
            latents[1, 0, 2, 3] = bad
            message = f"latents must be finite, got 1 NaN or infinite of {latents.numel()} values"
            for method in (quantizer, quantizer.encode):
                with _refused(promise, ValueError, message):
                    method(latents)
            _promise(_same_state(quantizer, before), promise, f"the state changes {_where(quantizer, _IMAGE)}")


@_check("under nonfinite='skip' all is as without the vectors that are not finite")
def _skipped_latents(promise: str, factory: QuantizerFactory) -> None:
    for training in (True, False):
        for bad in _NOT_FINITE:
            quantizer = _build(factory, training=training, nonfinite="skip")
            _skip_one(promise, quantizer, bad, drawn=training and _draws(quantizer))


def _skip_one(promise: str, quantizer: Quantizer, bad: float, *, drawn: bool) -> None:
    twin, latents = copy.deepcopy(quantizer), _latents(quantizer, (9, -1))
    kept = torch.arange(9) != 4
    others = latents[kept].requires_grad_()
    indices = quantizer.encode(torch.where(kept.unsqueeze(1), latents, 0.0))
    latents[4, 0] = bad
    latents.requires_grad_()
    output = quantizer(latents)
    (output.loss + output.quantized[kept].square().sum()).backward()
    where = f"with {bad} {_where(quantizer, (9, -1))}"
    if latents.grad is None:
        raise AssertionError(f"broken promise: {promise}; the latents get no gradient {where}.")
    _promise(not latents.grad[4].any(), promise, f"a skipped vector gets a gradient {where}")
    equal = torch.equal(output.quantized, output.codes) and torch.equal(
        quantizer.decode(output.indices), output.codes
    )
    _promise(equal, promise, f"decode(indices), codes and quantized are not the same bits {where}")
    finite = all(bool(value.isfinite().all()) for value in (output.loss, *quantizer.state_dict().values()))
    _promise(finite, promise, f"the loss or the state is not finite {where}")
    if drawn:
        return
    expected = twin(others)
    (expected.loss + expected.quantized.square().sum()).backward()
    _promise(torch.equal(output.indices, indices), promise, f"a skipped vector has not the code of zero {where}")
    _promise(torch.equal(output.indices[kept], expected.indices), promise, f"the others have other codes {where}")
    pairs = [(output.codes[kept], expected.codes), (output.loss, expected.loss), (latents.grad[kept], others.grad)]
    pairs += [(value, twin.state_dict()[name]) for name, value in quantizer.state_dict().items()]
    for found, wanted in pairs:
        close = wanted is not None and torch.allclose(found, wanted, rtol=1.3e-6, atol=1e-5)
        _promise(close, promise, f"codes, loss, gradient or state differ {where}")


@_check("with a mask all is as without the masked tokens, whose index is -1 and whose code is zero")
def _masked_latents(promise: str, factory: QuantizerFactory) -> None:
    for training, channel_dim, shape in ((True, 1, _IMAGE), (False, -1, (5, 7, -1))):
        quantizer = _build(factory, training=training, channel_dim=channel_dim, nonfinite="raise").double()
        drawn = training and _draws(quantizer, torch.float64)
        for step in range(3 if training else 1):
            where = f"after step {step + 1} {_where(quantizer, shape)}"
            _mask_some(promise, quantizer, shape, where, drawn=drawn)
        quantizer.apply_pending()
        before = _state(quantizer)
        latents = torch.full_like(_latents(quantizer, shape, torch.float64), math.nan).requires_grad_()
        output = quantizer(latents, mask=torch.zeros(_token_shape(shape), dtype=torch.bool))
        where = f"where all tokens are masked {_where(quantizer, shape)}"
        (output.loss + output.quantized.square().sum()).backward()
        losses = (output.codebook_loss.item(), output.commitment_loss.item())
        fits = losses == (0, 0) and bool(output.loss.isfinite())
        _promise(fits, promise, f"the losses are {losses} and {output.loss.item()} {where}")
        still = latents.grad is not None and not latents.grad.any()
        _promise(still, promise, f"a masked token has a gradient {where}")
        _promise(bool((output.indices == -1).all()), promise, f"the index of a masked token is not -1 {where}")
        _promise(_same_state(quantizer, before), promise, f"the state changes {where}")


def _mask_some(promise: str, quantizer: Quantizer, shape: tuple[int, ...], where: str, *, drawn: bool) -> None:
    twin, latents = copy.deepcopy(quantizer), _latents(quantizer, shape, torch.float64)
    mask = torch.rand(_token_shape(shape)) < 0.6
    others = _tokens(quantizer, latents)[mask].requires_grad_()
    _tokens(quantizer, latents)[~mask] = math.nan
    latents.requires_grad_()
    output = quantizer(latents, mask=mask)
    quantizer.zero_grad()
    (output.loss + output.quantized.square().sum()).backward()
    if latents.grad is None:
        raise AssertionError(f"broken promise: {promise}; the latents get no gradient {where}.")
    gradient, codes = (_tokens(quantizer, tensor) for tensor in (latents.grad, output.codes))
    fits = bool((output.indices[~mask] == -1).all())
    _promise(fits, promise, f"the index of a masked token is not -1 {where}")
    _promise(not gradient[~mask].any(), promise, f"a masked token has a gradient {where}")
    _promise(not codes[~mask].any(), promise, f"the code of a masked token is not zero {where}")
    equal = torch.equal(output.quantized, output.codes)
    equal = equal and torch.equal(quantizer.decode(output.indices), output.codes)
    _promise(equal, promise, f"decode(indices), codes and quantized are not the same bits {where}")
    if drawn:
        return
    encoded = quantizer.encode(latents, mask=mask)
    _promise(torch.equal(encoded, output.indices), promise, f"encode gives other indices {where}")
    expected = twin(others)
    twin.zero_grad()
    (expected.loss + expected.quantized.square().sum()).backward()
    equal = torch.equal(output.indices[mask], expected.indices)
    _promise(equal, promise, f"the other tokens have other codes {where}")
    pairs = [(codes[mask], expected.codes), (output.loss, expected.loss), (gradient[mask], others.grad)]
    pairs += [(value, twin.state_dict()[name]) for name, value in quantizer.state_dict().items()]
    parameters = zip(quantizer.parameters(), twin.parameters(), strict=True)
    pairs += [(one.grad, other.grad) for one, other in parameters if one.grad is not None]
    for found, wanted in pairs:
        close = wanted is not None and torch.allclose(found, wanted, rtol=1e-9, atol=1e-9)
        _promise(close, promise, f"codes, loss, gradient or state differ {where}")


@_check("a mask that is not bool, or of another shape or device than the tokens, is refused by name")
def _wrong_masks(promise: str, factory: QuantizerFactory) -> None:
    quantizer = _build(factory)
    latents = _latents(quantizer, _IMAGE)
    right = torch.ones(3, 4, 5).bool()
    owner = "latents without their channel axis"
    for method in (quantizer, quantizer.encode):
        with _refused(promise, TypeError, "mask must be bool, got torch.int64; pass mask.bool()."):
            method(latents, mask=right.long())
        with _refused(promise, TypeError, "mask must be a tensor, got list."):
            method(latents, mask=right.tolist())  # type: ignore[arg-type]
        for wrong in (right[:, :3], right.flatten(1), right.unsqueeze(1)):
            message = f"mask must be of shape (3, 4, 5) as the {owner}, got shape {tuple(wrong.shape)}."
            with _refused(promise, ValueError, message):
                method(latents, mask=wrong)
        with _refused(promise, ValueError, f"mask must be on cpu as the {owner}, got meta."):
            method(latents, mask=right.to("meta"))


@_check("under nonfinite='off' a vector that is not finite gets some code and leaves the others alone")
def _unchecked_latents(promise: str, factory: QuantizerFactory) -> None:
    for bad in _NOT_FINITE:
        quantizer = _build(factory, nonfinite="off")
        latents = _latents(quantizer, (9, -1))
        clean = quantizer.encode(latents)
        latents[4, 0] = bad
        output = quantizer(latents)
        equal = torch.equal(quantizer.decode(output.indices), output.codes)
        equal = equal and torch.equal(output.quantized, output.codes)
        _promise(equal, promise, f"decode(indices), codes and quantized are not the same bits with {bad}")
        _promise(torch.equal(quantizer.encode(latents), output.indices), promise, f"encode differs with {bad}")
        kept = torch.arange(9) != 4
        _promise(torch.equal(output.indices[kept], clean[kept]), promise, f"other vectors change with {bad}")


@_check("a frozen quantizer changes nothing in training, and takes no gradients, until it is thawed")
def _freezing(promise: str, factory: QuantizerFactory) -> None:
    quantizer = _build(factory, training=True)
    learns = [name for name, parameter in quantizer.named_parameters() if parameter.requires_grad]
    latents = _latents(quantizer, (9, -1)).requires_grad_()
    frozen = quantizer.freeze()
    _promise(frozen is quantizer and quantizer.frozen, promise, "freeze() does not return the frozen quantizer")
    before = _state(quantizer)
    output = quantizer(latents)
    (output.loss + output.quantized.square().sum()).backward()
    _promise(latents.grad is not None, promise, "the latents get no gradient")
    _promise(_same_state(quantizer, before), promise, "the state changes")
    gradients = [name for name, parameter in quantizer.named_parameters() if parameter.grad is not None]
    _promise(not gradients, promise, f"{gradients} take gradients")
    quantizer.freeze(False)
    again = [name for name, parameter in quantizer.named_parameters() if parameter.requires_grad]
    _promise(again == learns, promise, f"{again} learn after freeze(False), and {learns} before")


@_check("under activation checkpointing gradients and state are those of training without it")
def _checkpointing(promise: str, factory: QuantizerFactory) -> None:
    plain = _build(factory, training=True)
    twin = copy.deepcopy(plain)
    for step in range(3):
        batch = _latents(plain, _IMAGE)
        gradients = []
        for quantizer in (plain, twin):
            latents = batch.clone().requires_grad_()
            seed_cpu(step)
            scalar = _checkpointed(quantizer, latents) if quantizer is twin else _scalar(quantizer, latents)
            gradients.append(torch.autograd.grad(scalar, latents)[0])
        where = f"in step {step + 1}"
        _promise(torch.equal(*gradients), promise, f"the gradient of the latents differs {where}")
        _promise(_same_state(twin, _state(plain)), promise, f"the state differs {where}")


def _scalar(quantizer: Quantizer, latents: Tensor) -> Tensor:
    output = quantizer(latents)
    return output.loss + output.quantized.square().sum()


def _checkpointed(quantizer: Quantizer, latents: Tensor) -> Tensor:
    scalar: Tensor = checkpoint(partial(_scalar, quantizer), latents, use_reentrant=False)
    return scalar


@_check("a copy goes on exactly as the original, and changing one leaves the other")
def _copies(promise: str, factory: QuantizerFactory) -> None:
    original = _build(factory, training=True)
    original(_latents(original, _IMAGE))
    twin = copy.deepcopy(original)
    _promise(repr(original) == repr(twin), promise, f"{twin!r} is not {original!r}")
    before = _state(original)
    latents = _latents(original, _IMAGE)
    seed_cpu(1)
    changed = twin(latents)
    _promise(_same_state(original, before), promise, "a step of the copy changes the original")
    seed_cpu(1)
    output = original(latents)
    equal = all(torch.equal(one, other) for one, other in zip(output, changed, strict=True))
    _promise(equal and _same_state(original, _state(twin)), promise, "their next step differs")


@_check("a fresh quantizer that loads the state dict goes on exactly as the original")
def _state_dicts(promise: str, factory: QuantizerFactory) -> None:
    original = _build(factory, training=True)
    original(_latents(original, _IMAGE))
    twin = _build(factory, training=True, spread=False)
    twin.load_state_dict(_state(original), strict=True)
    latents = _latents(original, _IMAGE)
    outputs = []
    for quantizer in (original, twin):
        seed_cpu(1)
        outputs.append(quantizer(latents))
    equal = all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))
    _promise(equal and _same_state(original, _state(twin)), promise, "its next step differs")


@_check("a training step takes its randomness from generator where one is given")
def _generators(promise: str, factory: QuantizerFactory) -> None:
    quantizer = _build(factory, training=True)
    latents = _latents(quantizer, (64, -1))
    before, outputs = copy.deepcopy(quantizer), []
    for global_seed in (1, 2):
        twin = copy.deepcopy(before)
        seed_cpu(global_seed)
        outputs.append(twin(latents, generator=torch.Generator().manual_seed(3)))
    equal = all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))
    _promise(equal, promise, "two steps with equal generators differ")
    with _refused(promise, TypeError, "generator must be a torch.Generator, got 3."):
        quantizer(latents, generator=3)  # type: ignore[arg-type]


QUANTIZER_CHECKS: dict[str, Callable[[QuantizerFactory], None]] = {
    "is-a-quantizer": _is_a_quantizer,
    "outputs": _outputs,
    "decoding": _decoding,
    "half-latents": _half_latents,
    "precisions": _precisions,
    "token-shifts": _token_shifts,
    "layouts": _layouts,
    "memory-order": _memory_order,
    "memory-formats": _memory_formats,
    "encoding": _encoding,
    "gradients": _gradients,
    "empty-batches": _empty_batches,
    "wrong-latents": _wrong_latents,
    "wrong-indices": _wrong_indices,
    "raised-latents": _raised_latents,
    "skipped-latents": _skipped_latents,
    "unchecked-latents": _unchecked_latents,
    "masked-latents": _masked_latents,
    "wrong-masks": _wrong_masks,
    "freezing": _freezing,
    "checkpointing": _checkpointing,
    "copies": _copies,
    "state-dicts": _state_dicts,
    "generators": _generators,
}
"""What :func:`check_quantizer` runs. Each takes a factory and raises ``AssertionError`` for a broken promise."""
