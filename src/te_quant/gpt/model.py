"""A decoder-only transformer over sequences of segments: captions and image tokens, in any order.

The network reads ``start, token 0, token 1, ...`` and predicts after each what comes next, so its prediction of
token i depends only on the tokens before it. Logits align with tokens: ``logits[:, i]`` are about
``tokens[:, i]``, and callers never shift.

Shape letters: B batch, T tokens of a sequence, P tokens of a prompt, t tokens of a chunk, V vocabulary, D width,
H heads.

Source: Radford et al. 2019, "Language models are unsupervised multitask learners" (GPT-2), for the network; Ramesh
et al. 2021, arXiv:2102.12092, for captions and image tokens in one sequence; Shin et al. 2021, arXiv:2112.00384,
for both orders with the same weights.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from te_quant import _pretrained
from te_quant._checks import (
    require,
    require_axis,
    require_int,
    require_integer_tensor,
    require_mask,
    require_number,
    require_rank,
    require_type,
)
from te_quant._execution import overwrite, refuse_training_export, require_whole, reshard_owners
from te_quant._precision import AUTOCAST_DEVICES, widen
from te_quant._pretrained import Report
from te_quant.gpt.blocks import INITIAL_STD, Block, SegmentEnds
from te_quant.gpt.card import gpt_card
from te_quant.gpt.config import GPTConfig, Segment
from te_quant.gpt.former_names import with_present_names
from te_quant.gpt.sampling import Ending, Sampler, extend, guided_logits
from te_quant.gpt.segment_layout import Layout, Span, own_columns

__all__ = ["GPT", "GPTConfig", "KeyValueCache", "Segment"]


class KeyValueCache:
    """The keys and values of the tokens that a :class:`GPT` has read; :meth:`GPT.new_cache` makes one.

    Attributes:
        layout: which columns each segment takes.
        length: how many tokens it has been given.
        memory: for each block (2, B, H, 1 + capacity, D/H) keys and values, of the start and then of the tokens.
        state: (B, 1, D), what the network says after the last token; (B, 0, D) before it has read the start.
        compiled: whether single tokens are read by compiled code.
    """

    def __init__(self, layout: Layout, memory: list[Tensor], state: Tensor, compiled: bool = False) -> None:
        self.layout = layout
        self.length = 0
        self.memory = memory
        self.state = state
        self.compiled = compiled

    @property
    def order(self) -> tuple[str, ...]:
        """Names of the segments of the sequence."""
        return self.layout.names

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        return self.state.shape[0]


class GPT(nn.Module):
    """Predicts each token of a sequence of segments from those before it.

    The same weights serve every order of the segments: positions belong to a segment, not to a sequence, and only
    the vector that stands at the front says which segment comes first.

    Args:
        config: every option.

    Example:
        >>> text, image = Segment("text", 40, (6,), "learned"), Segment("image", 16, (4, 4), "axial")
        >>> gpt = GPT(GPTConfig((text, image), width=32, depth=2, num_heads=2)).eval()
        >>> caption = torch.zeros(1, 6, dtype=torch.int64)
        >>> gpt.generate(caption, order=("text", "image")).shape
        torch.Size([1, 22])

    Shape:
        tokens: (B, T) integers, those of the first segment of the order, then those of the next. Each is an
            integer of its segment's own vocabulary. All segments but the last are complete.
        logits: (B, T, V), V the largest ``vocab_size``; -inf beyond the vocabulary of the token's segment.

    Raises:
        ValueError: the order names a segment twice or one that is not there, there are more tokens than it has, or
            one lies outside its vocabulary (accelerators leave that to their kernels, so as not to wait).
        TypeError: tokens are not integers, or a mask is not bool.
        RuntimeError: FSDP2 has sharded the weights, and a method other than ``forward`` is called without
            ``torch.distributed.fsdp.register_fsdp_forward_method``.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        require_type("config", config, GPTConfig, "a GPTConfig")
        self.config = config
        D = config.width
        self.ends = nn.ModuleList(SegmentEnds(segment, D, config.tied_head) for segment in config.segments)
        self.start = nn.Parameter(INITIAL_STD * torch.randn(len(config.segments), D))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(D)
        self.register_load_state_dict_pre_hook(_rename_entries)  # type: ignore[no-untyped-call]

    def forward(
        self,
        tokens: Tensor,
        order: Sequence[str] | None = None,
        *,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """(B, T) tokens to (B, T, V) logits, each about its token and from the tokens before it.

        Args:
            tokens: of the whole sequence from its first column on, or the next ones after those in ``cache``.
            order: names of some or all segments as they follow each other. ``None``: that of the cache, else that
                of the config.
            mask: (B, T) bool; tokens with mask False are ignored and may be any integers, such as -1; the others
                keep the positions of their columns.
                The token after an ignored one is predicted from the last token before it that counts.
            cache: what was given before; the tokens are added to it. There is no gradient then.

        Raises:
            ValueError: also if a mask is given with a cache, or another order than the cache has.
        """
        if cache is None:
            layout = self._layout(order)
            tokens, states = self._predictions(tokens, layout, mask)
            return self._logits(layout, states, 0)
        require_type("cache", cache, KeyValueCache, "a KeyValueCache")
        require(mask is None, "mask", "None with a cache", "a tensor")
        if order is not None:
            same = self._layout(order) == cache.layout
            require(same, "order", f"that of the cache, {cache.order}", tuple(order))
        return self._continue(tokens, cache)

    def losses(
        self,
        tokens: Tensor,
        order: Sequence[str] | None = None,
        ignore_index: int = -100,
        *,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the mean cross entropy of the tokens of each segment in nats, without a tensor of all logits.

        Args:
            tokens: (B, T), as of :meth:`forward`.
            order: as of :meth:`forward`.
            ignore_index: the negative integer that takes a target out of the mean.
            targets: (B, T) integers, what should be predicted. ``None``: the tokens, but for those that the mask
                takes out.
            mask: as of :meth:`forward`.

        Returns:
            A value of shape () for each segment that has tokens here, as they follow each other; zero, with zero
            gradient, where all targets are ignored. Give a loss that is not trained the weight zero under
            ``DistributedDataParallel``, which expects a gradient for every parameter.
        """
        ignore_index = require_int("ignore_index", ignore_index, maximum=-1)
        layout = self._layout(order)
        tokens, states = self._predictions(tokens, layout, mask)
        if targets is None:
            targets = tokens if mask is None else tokens.masked_fill(~mask, ignore_index)
        else:
            targets = layout.checked("targets", targets, tokens.device, ignored=ignore_index)
            _require_shape("targets", targets, tokens)
        losses = {}
        for span, begin, end in layout.within(0, tokens.shape[1]):
            wanted = targets[:, begin:end].flatten()
            logits = widen(self._ends(span).logits(states[:, begin:end]).flatten(0, 1))
            total = F.cross_entropy(logits, wanted, ignore_index=ignore_index, reduction="sum")
            losses[span.segment.name] = total / (wanted != ignore_index).sum().clamp_min(1)
        return losses

    def log_prob(
        self, tokens: Tensor, order: Sequence[str] | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        """(B, T) tokens to (B, T), the logarithm of the probability of each token after those before it, in nats.

        The sum over a row is the log-probability of its sequence; minus the mean over a segment is the loss of
        :meth:`losses`. It has a gradient, and is NaN where logits are NaN.

        Args:
            tokens: as of :meth:`forward`.
            order: as of :meth:`forward`.
            mask: as of :meth:`forward`; tokens with mask False have log-probability 0.

        Shape:
            result: (B, T), at least float32.
        """
        layout = self._layout(order)
        tokens, states = self._predictions(tokens, layout, mask)
        parts = []
        for span, begin, end in layout.within(0, tokens.shape[1]):
            logits, wanted = self._ends(span).logits(states[:, begin:end]), tokens[:, begin:end]
            losses = F.cross_entropy(widen(logits.flatten(0, 1)), wanted.flatten(), reduction="none")
            parts.append(-losses.view(wanted.shape))
        result = torch.cat(parts, 1) if parts else widen(states.new_empty(tokens.shape))
        return result if mask is None else result.masked_fill(~mask, 0.0)

    def new_cache(
        self,
        batch: int,
        *,
        order: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        compiled: bool = False,
    ) -> KeyValueCache:
        """Return an empty cache for ``batch`` sequences, with memory for all tokens of ``order``.

        Give it tokens in chunks of any size, through :meth:`forward` for the logits about them, or through
        :meth:`next_logits` for those about the token after them. It holds for the weights of the moment.

        Args:
            batch: B, at least 0.
            order: as of :meth:`forward`.
            dtype: of keys and values. ``None``: that of autocast where it is on, else that of the weights.
            compiled: whether :meth:`next_logits` reads single tokens with compiled code, as :meth:`generate` does.

        Raises:
            ValueError: dropout is at work, or as :meth:`forward`.
            TypeError: the dtype is not floating point, or ``compiled`` is not a bool.
        """
        batch = require_int("batch", batch, 0)
        require_type("compiled", compiled, bool, "a bool")
        layout = self._layout(order)
        return self._new_cache(batch, layout, layout.length, dtype, compiled=compiled)

    @torch.no_grad()
    def next_logits(self, cache: KeyValueCache, tokens: Tensor | None = None) -> Tensor:
        """(B, V) logits about the token after those in ``cache`` and then ``tokens``, which are added to it.

        Args:
            cache: of :meth:`new_cache`.
            tokens: (B, t), the next ones. ``None``: no more.

        Raises:
            ValueError: nothing comes after them, or as :meth:`forward`.
        """
        require_type("cache", cache, KeyValueCache, "a KeyValueCache")
        if tokens is None:
            tokens = torch.empty(cache.batch, 0, dtype=torch.int64, device=self.start.device)
        tokens = self._checked_next(tokens, cache)
        length, end = cache.length + tokens.shape[1], cache.layout.length
        if length >= end:
            require(False, "cache", f"short of the end of its order, {end} tokens", f"{length} with the new ones")
        if self._can_step(cache, tokens):
            known = self._step(cache, tokens)
            V = max(segment.vocab_size for segment in self.config.segments)
            return F.pad(known, (0, V - known.shape[-1]), value=-math.inf)
        self._extend(cache, tokens)
        return self._logits(cache.layout, cache.state, length).squeeze(1)

    @overload
    def generate(
        self,
        prompt: Tensor,
        *,
        order: Sequence[str] | None = ...,
        max_new_tokens: int | None = ...,
        prompt_lengths: Tensor | None = ...,
        prompt_mask: Tensor | None = ...,
        temperature: float = ...,
        top_k: int | None = ...,
        top_fraction: float | None = ...,
        top_p: float | None = ...,
        guidance_scale: float = ...,
        generator: torch.Generator | Sequence[torch.Generator] | None = ...,
        stop_token: int | None = ...,
        callback: Callable[[int, Tensor], object] | None = ...,
        use_cache: bool = ...,
        compiled: bool = ...,
        return_log_prob: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def generate(
        self,
        prompt: Tensor,
        *,
        order: Sequence[str] | None = ...,
        max_new_tokens: int | None = ...,
        prompt_lengths: Tensor | None = ...,
        prompt_mask: Tensor | None = ...,
        temperature: float = ...,
        top_k: int | None = ...,
        top_fraction: float | None = ...,
        top_p: float | None = ...,
        guidance_scale: float = ...,
        generator: torch.Generator | Sequence[torch.Generator] | None = ...,
        stop_token: int | None = ...,
        callback: Callable[[int, Tensor], object] | None = ...,
        use_cache: bool = ...,
        compiled: bool = ...,
        return_log_prob: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    def generate(
        self,
        prompt: Tensor,
        *,
        order: Sequence[str] | None = None,
        max_new_tokens: int | None = None,
        prompt_lengths: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_fraction: float | None = None,
        top_p: float | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        stop_token: int | None = None,
        callback: Callable[[int, Tensor], object] | None = None,
        use_cache: bool = True,
        compiled: bool = False,
        return_log_prob: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(B, P) tokens to (B, P + new) tokens: each new one drawn from what the network says about it.

        Args:
            prompt: (B, P) integers, as of :meth:`forward`; P may be 0.
            order: as of :meth:`forward`.
            max_new_tokens: columns added, at least 0. ``None``: all that the order has left.
            prompt_lengths: (B,) integers in [0, P], how many tokens of each row are its prompt; short for
                ``prompt_mask=torch.arange(P) < prompt_lengths[:, None]``. Not with ``prompt_mask``.
            prompt_mask: (B, P) bool, which tokens of the prompt are given, at any place; ``None``: all. The others
                are ignored and drawn, in the order of the sequence. Each depends on the tokens before it, drawn or
                given, and not on those given after it.
            temperature: what logits are divided by, >= 0; 0 takes the likeliest token.
            top_k: keep the k largest logits, or all of a smaller vocabulary.
            top_fraction: keep this share of the segment's vocabulary, in (0, 1]: the ⌊share·V⌋ largest logits, at
                least one. Not with ``top_k``.
            top_p: of what is kept so far, keep the fewest tokens whose probabilities add up to this, in (0, 1].
            guidance_scale: of classifier-free guidance, at least 0: how strongly tokens follow the condition, the
                segments before that of the first token drawn. :func:`guided_logits` combines the logits with those
                of the order without the condition, which the network should have been trained on; temperature
                and the options above apply to the result. 1 is no guidance and costs nothing; every other value
                costs a second pass per token.
            generator: all randomness; the global one if ``None``. With a sequence of B generators each row has its
                own: but for rounding, its tokens depend neither on the batch size nor on the other rows.
            stop_token: the token that ends a row; the rest of it is the segment's ``pad_token``, else the stop
                token again. When every row has ended, nothing more is computed. Tokens of a prompt end nothing.
                For a single segment only: generate one, then the next with that as the prompt.
            callback: called with each column drawn and its (B,) tokens; not for columns filled after the end, nor
                for those that the prompt gives to every row.
            use_cache: whether keys and values are kept. Without, every token costs a pass over all before it; the
                results differ by rounding.
            compiled: whether the forward pass of each generated token is compiled with ``torch.compile``, which is
                faster; results differ by rounding. The first call compiles, which takes up to a minute: once per
                segment, and again per segment for a batch of one. Later calls reuse the code for other prompts,
                options and batches; another dtype, autocast, grad mode or number of threads compiles again. Torch
                keeps eight versions in all (``torch._dynamo.config.recompile_limit``); whatever comes later runs
                uncompiled, and torch logs a warning. Ordinary code reads the prompt and the last token of each
                segment, and hooks of blocks run only there. CPUs need a C++ compiler. Not with
                ``use_cache=False``.
            return_log_prob: whether to return (B, P + new) log-probabilities too, in nats: of each token under the
                distribution that it was drawn from, after guidance, temperature and all that drops tokens; 0 for
                tokens that were not drawn. :meth:`log_prob` gives those of the network itself.

        Raises:
            ValueError: an option is out of range or contradicts another, the prompt does not fit the order,
                guidance has no condition, dropout is at work, or logits have NaN or +inf; an accelerator looks at
                them once, at the end.
            TypeError: the prompt or its lengths are not integers, its mask is not bool, or an option has the
                wrong type.

        Source: the published code of Shin et al. 2021, arXiv:2112.00384, keeps a tenth of the logits of all
            segments together: ``top_k=int(0.1 * (text vocabulary + text length + K))``.
        """
        sampler = Sampler(temperature, top_k, top_fraction, top_p, generator)
        guidance_scale = require_number("guidance_scale", guidance_scale, 0)
        require_type("compiled", compiled, bool, "a bool")
        require(
            use_cache or not compiled,
            "compiled",
            "False with use_cache=False",
            f"{compiled}; drop use_cache=False",
        )
        self._require_no_dropout()
        layout = self._layout(order)
        own = own_columns(prompt, prompt_lengths, prompt_mask)
        if own is not None:
            require_integer_tensor("prompt", prompt)
            prompt = prompt.long().masked_fill(~own, 0)
        prompt = layout.checked("prompt", prompt, self.start.device, always_look=True)
        B, P = prompt.shape
        _require_generators(generator, prompt)
        new = layout.length - P
        if max_new_tokens is not None:
            max_new_tokens = require_int("max_new_tokens", max_new_tokens, 0, new)
            new = max_new_tokens
        sequence = F.pad(prompt, (0, new))
        # Of each row, the first column that it has to draw.
        firsts = [P] * B if own is None else own.cumprod(1).sum(1).tolist()
        first = min(firsts, default=P)
        if own is not None:
            own = F.pad(own, (0, new))
        ending = None if stop_token is None else _ending(stop_token, layout, first, P + new)
        predict = self._predictor(layout, sequence, use_cache, compiled)
        if guidance_scale != 1 and B and first < P + new:
            span = _drawn_span(layout, firsts, P + new, guidance_scale)
            rest = self._layout(layout.names[layout.spans.index(span) :])
            unconditional = self._predictor(rest, sequence, use_cache, compiled, skipped=span.begin)
            predict = _guided(predict, unconditional, guidance_scale)
        shares = None
        if return_log_prob:
            shares = torch.ones(sequence.shape, dtype=widen(self.start).dtype, device=sequence.device)
        extend(sequence, first, predict, sampler, own=own, ending=ending, callback=callback, shares=shares)
        return sequence if shares is None else (sequence, shares.log())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start again: give all parameters and buffers new values, as those of a new GPT.

        For a GPT that was built on the meta device, whose values ``to_empty`` leaves undefined. No other call is
        needed: ``reset_parameters`` of the layers inside would overwrite its scales. Random values are those of
        the global generator, which needs the same seed in all processes.

        Example:
            >>> with torch.device("meta"):
            ...     gpt = GPT(GPTConfig((Segment("image", 16, (4, 4), "axial"),), width=32, depth=2, num_heads=2))
            >>> gpt.to_empty(device="cpu").reset_parameters()
            >>> bool(gpt(torch.zeros(1, 16, dtype=torch.int64)).isfinite().all())
            True
        """
        reshard_owners(self)
        values = type(self)(self.config).state_dict()
        for name, tensor in self.state_dict(keep_vars=True).items():
            overwrite(tensor, values[name])

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``model.safetensors`` and ``config.json`` into ``folder``, each as a whole or not at all.

        Raises:
            ValueError: ``folder`` is a file; the model is on the meta device; a layer was added, was replaced by
                another one, or has other options than the config says, dropout included; two weights are tied, or
                parametrizations or wrappers give weights other names. Compiled
                modules are saved under the names that they have without :func:`torch.compile`.
            ImportError: safetensors is not installed (``te_quant[hub]``).
            RuntimeError: FSDP2 has sharded the weights; the message names the cure.
        """
        # On the meta device building takes no memory and draws nothing.
        with torch.device("meta"):
            described = GPT(self.config)
        state = _pretrained.described_state(self, self.state_dict(), described, described.state_dict())
        _pretrained.save(folder, "GPT", self.config.to_dict(), state)

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
            reports: title to report: anything with a method ``to_markdown()``, such as a
                :class:`~te_quant.tables.Table`.
            license_name: identifier of the licence as the hub knows it, such as ``"mit"``.

        Raises:
            ValueError: ``repo_id`` is not of the form ``owner/name``, or a report has no ``to_markdown``.
            TypeError: another argument is of the wrong kind.

        Example:
            >>> gpt = GPT(GPTConfig((Segment("image", 16, (4, 4), "axial"),), width=32, depth=2, num_heads=2))
            >>> "# digits-gpt" in gpt.model_card("me/digits-gpt").splitlines()
            True
        """
        parameters = sum(parameter.numel() for parameter in self.parameters())
        return gpt_card(self.config, parameters, repo_id=repo_id, reports=reports or {}, license_name=license_name)

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> GPT:
        """Return the model that :meth:`save_pretrained` wrote, in evaluation mode.

        Args:
            source: a local folder, else a hub id ``owner/name``.
            device: where to put the model; None is the CPU.
            dtype: floating-point type to convert it to; None keeps the saved ones.
            revision: branch, tag or commit, for a hub id only.
            token: of an account that may read the repository, for a hub id only.
            cache_dir: where downloads are kept, for a hub id only.
            local_files_only: use only what has been downloaded before.

        Raises:
            FileNotFoundError: no such folder, or a file is missing in it.
            ValueError: ``source`` is a file, or a file in it is damaged, of another format version, or does not
                fit the other.
            ImportError: safetensors or huggingface_hub is not installed (``te_quant[hub]``).
        """
        return _pretrained.load(
            "GPT",
            GPTConfig.from_dict,
            cls,
            source,
            device=device,
            dtype=dtype,
            hub=_pretrained.Hub(revision, token, cache_dir, local_files_only),
            rename=with_present_names,
        )

    def _predictions(self, tokens: Tensor, layout: Layout, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The tokens, checked, and (B, T, D), what the network says before each of them."""
        if mask is not None:
            require_rank("tokens", tokens, (2,), "(B, T)")
            require_integer_tensor("tokens", tokens)
            require_mask("mask", mask, tuple(tokens.shape), tokens.device, "tokens")
            tokens, mask = tokens.long().masked_fill(~mask, 0), mask[:, :-1]
        tokens = layout.checked("tokens", tokens, self.start.device)
        return tokens, self._read(layout, tokens[:, :-1], mask)[:, : tokens.shape[1]]

    def _read(self, layout: Layout, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, n) tokens to (B, n + 1, D), what the network says after the start and after each token."""
        stream, visible = self._embed(layout, tokens, 0, with_start=True), None
        if mask is not None:
            stream, visible = _omit(stream, mask)
        for block in self.blocks:
            stream = block(stream, visible, None, 0)
        states: Tensor = self.norm(stream)
        return states

    @torch.no_grad()
    def _continue(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        tokens = self._checked_next(tokens, cache)
        first, before = cache.length, cache.state
        states = torch.cat([before, self._extend(cache, tokens)], 1)
        return self._logits(cache.layout, states[:, : tokens.shape[1]], first)

    def _extend(self, cache: KeyValueCache, tokens: Tensor) -> Tensor:
        """As :meth:`_read`, but of tokens that follow those in the cache; the start is read only once."""
        fresh = not cache.state.shape[1]
        past = 0 if fresh else 1 + cache.length
        stream = self._embed(cache.layout, tokens, cache.length, with_start=fresh)
        t = stream.shape[1]
        if not t:
            return stream
        visible = None
        if past and t > 1:
            visible = torch.ones(t, past + t, dtype=torch.bool, device=tokens.device).tril(past)
        for block, memory in zip(self.blocks, cache.memory, strict=True):
            stream = block(stream, visible, memory, past)
        states: Tensor = self.norm(stream)
        cache.state = states[:, -1:]
        cache.length += tokens.shape[1]
        return states

    def _can_step(self, cache: KeyValueCache, tokens: Tensor) -> bool:
        """Whether compiled code reads these tokens: one per row, and the next one belongs to the same segment."""
        if not (cache.compiled and tokens.shape[1] == 1 and cache.batch):
            return False
        # Not the first token: a compiler takes sizes of 0 and 1 for constants and would compile once more for it.
        return cache.length > 0 and cache.layout.at(cache.length) is cache.layout.at(cache.length + 1)

    def _step(self, cache: KeyValueCache, tokens: Tensor) -> Tensor:
        """(B, 1) tokens that follow those in the cache to the (B, V) logits about the next ones, compiled."""
        span = cache.layout.at(cache.length)
        place = torch.full((1,), cache.length - span.begin, device=tokens.device)
        # Copied, as code that was compiled for the strides of one sequence would be compiled again for another.
        tokens = tokens[:, 0].clone(memory_format=torch.contiguous_format)
        step = _compiled_step()
        state, logits = step(self, self._ends(span), tokens, place, cache.memory, 1 + cache.length)
        cache.state = state.unsqueeze(1)
        cache.length += 1
        return logits

    def _predictor(
        self, layout: Layout, sequence: Tensor, use_cache: bool, compiled: bool, skipped: int = 0
    ) -> Callable[[int, int], Tensor]:
        """What predicts the columns of ``sequence`` for :func:`~te_quant.gpt.sampling.extend`.

        Args:
            layout: of the columns that the network reads.
            sequence: (B, T), looked at when a column is predicted.
            use_cache: as of :meth:`generate`.
            compiled: as of :meth:`generate`.
            skipped: how many columns at the front of the sequence it does not read.
        """
        B, T = sequence.shape
        cache = self._new_cache(B, layout, T - skipped, compiled=compiled) if use_cache else None

        def predict(begin: int, end: int) -> Tensor:
            if cache is None:
                states = self._read(layout, sequence[:, skipped:end])
            else:
                tokens = sequence[:, max(begin, skipped) : end]
                if self._can_step(cache, tokens):
                    return self._step(cache, tokens)
                states = self._extend(cache, tokens)
            return self._ends(layout.at(end - skipped)).logits(states[:, -1])

        return predict

    def _embed(self, layout: Layout, tokens: Tensor, first: int, *, with_start: bool) -> Tensor:
        """(B, t) tokens of the columns from ``first`` on to (B, t, D), or (B, 1 + t, D) with the start."""
        require_whole((self.start, *self.ends.parameters()), "GPT", "gpt", "generate")
        refuse_training_export(self.training and self.config.dropout > 0, "a GPT with dropout")
        B, t = tokens.shape
        parts = [self.start[layout.spans[0].number].expand(B, 1, -1)] if with_start else []
        for span, begin, end in layout.within(first, first + t):
            parts.append(self._ends(span).embed(tokens[:, begin - first : end - first], begin - span.begin))
        stream = torch.cat(parts, 1) if parts else self.start.new_empty(B, 0, self.config.width)
        return F.dropout(stream, self.config.dropout, self.training)

    def _logits(self, layout: Layout, states: Tensor, first: int) -> Tensor:
        """(B, t, D) states before the columns from ``first`` on to (B, t, V), -inf beyond each vocabulary."""
        V = max(segment.vocab_size for segment in self.config.segments)
        B, t, _ = states.shape
        parts = []
        for span, begin, end in layout.within(first, first + t):
            known = self._ends(span).logits(states[:, begin - first : end - first])
            parts.append(F.pad(known, (0, V - known.shape[-1]), value=-math.inf))
        return torch.cat(parts, 1) if parts else states.new_empty(B, 0, V)

    def _ends(self, span: Span) -> SegmentEnds:
        return cast(SegmentEnds, self.ends[span.number])

    def _layout(self, order: Sequence[str] | None) -> Layout:
        return Layout.of(self.config.segments, order)

    def _new_cache(
        self,
        batch: int,
        layout: Layout,
        capacity: int,
        dtype: torch.dtype | None = None,
        *,
        compiled: bool = False,
    ) -> KeyValueCache:
        self._require_no_dropout()
        start, config = self.start, self.config
        if dtype is None:
            device = start.device.type
            autocast = device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)
            dtype = torch.get_autocast_dtype(device) if autocast else start.dtype
        require_type("dtype", dtype, torch.dtype, "a torch.dtype")
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be floating point, got {dtype}.")
        shape = (2, batch, config.num_heads, 1 + capacity, config.width // config.num_heads)
        memory = [torch.empty(shape, dtype=dtype, device=start.device) for _ in range(config.depth)]
        return KeyValueCache(layout, memory, start.detach().new_empty(batch, 0, config.width), compiled)

    def _checked_next(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        self._require_no_dropout()
        tokens = cache.layout.checked("tokens", tokens, self.start.device, first=cache.length)
        require_axis("tokens", tokens, 0, cache.batch, "batch of the cache")
        config = self.config
        own = (config.depth, config.num_heads, config.width // config.num_heads)
        given = (len(cache.memory), cache.memory[0].shape[2], cache.memory[0].shape[4])
        names = "(depth, num_heads, width / num_heads)"
        require(given == own, "cache", f"that of a model with {names}={own}", f"one with {given}")
        return tokens

    def _require_no_dropout(self) -> None:
        noisy = self.training and self.config.dropout > 0
        mode = f"training mode with dropout={self.config.dropout:g}"
        require(not noisy, "GPT", "in evaluation mode to generate or to cache (call eval())", mode)


_Step = Callable[[GPT, SegmentEnds, Tensor, Tensor, list[Tensor], int], tuple[Tensor, Tensor]]


def _next_step(
    gpt: GPT, ends: SegmentEnds, tokens: Tensor, place: Tensor, memory: list[Tensor], past: int
) -> tuple[Tensor, Tensor]:
    """(B,) tokens at one place of a segment to the (B, D) states after them and the (B, V) logits."""
    stream = ends.embed_step(tokens, place)
    for block, own in zip(gpt.blocks, memory, strict=True):
        stream = cast(Block, block).step(stream, own, past)
    state: Tensor = gpt.norm(stream)
    return state, ends.logits_step(state)


@functools.cache
def _compiled_step() -> _Step:
    """The step for any column and any batch: ``dynamic`` keeps both out of the compiled code.

    Created on first use, because importing torch's compiler takes a second.
    """
    # Sizes are those of tensors made here; with checks of all of them a call takes a fifth longer.
    return torch.compile(_next_step, dynamic=True, options={"size_asserts": False})


def _rename_entries(_module: nn.Module, state: dict[str, Any], *_: object) -> None:
    """Give the entries of an older checkpoint their present names, in place."""
    renamed = with_present_names(state)
    state.clear()
    state.update(renamed)


def _omit(stream: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What makes the tokens where the (B, n) mask is False as if they were not there.

    Nobody sees them, and their places in the (B, n + 1, D) stream, which have to say what follows, become copies
    of the last one that is there.
    """
    there = F.pad(mask, (1, 0), value=True)
    n = there.shape[1]
    columns = torch.arange(n, device=mask.device)
    last = torch.where(there, columns, 0).cummax(1).values
    causal = torch.ones(n, n, dtype=torch.bool, device=mask.device).tril()
    return stream.gather(1, last.unsqueeze(-1).expand_as(stream)), there[:, None, None, :] & causal


def _guided(
    conditional: Callable[[int, int], Tensor], unconditional: Callable[[int, int], Tensor], scale: float
) -> Callable[[int, int], Tensor]:
    return lambda begin, end: guided_logits(conditional(begin, end), unconditional(begin, end), scale)


def _drawn_span(layout: Layout, firsts: Sequence[int], last: int, scale: float) -> Span:
    """The segment in which every row begins to be drawn; all before it is the condition of guidance."""
    spans = {layout.at(column) for column in firsts if column < last}
    names = sorted(span.segment.name for span in spans)
    expected = f"complete up to the same segment in every row with guidance_scale={scale:g}"
    require(len(spans) == 1, "prompt", expected, f"rows that go on in {names}; generate them in separate calls")
    (span,) = spans
    name, columns = span.segment.name, span.end
    require(
        len(layout.spans) > 1,
        "order",
        f"one of at least two segments with guidance_scale={scale:g}, the condition first",
        f"{layout.names}; pass guidance_scale=1",
    )
    expected = f"at least the {columns} tokens of {name!r}, the condition of guidance_scale={scale:g}"
    cure = f"generate {name!r} with guidance_scale=1 first"
    require(span.begin > 0, "prompt", expected, f"{min(firsts)}; {cure}")
    return span


def _require_generators(generator: torch.Generator | Sequence[torch.Generator] | None, prompt: Tensor) -> None:
    """Refuse generators of another device than the prompt's, or of another number than its rows."""
    if generator is None:
        return
    if isinstance(generator, torch.Generator):
        generator = [generator]
    else:
        B = prompt.shape[0]
        require(len(generator) == B, "generator", f"one torch.Generator, or {B}, one per row", len(generator))
    for each in generator:
        same = each.device.type == prompt.device.type
        require(same, "generator", f"on {prompt.device} as the prompt", each.device)


def _ending(stop_token: int, layout: Layout, first: int, last: int) -> Ending:
    segments = [span.segment for span, _, _ in layout.within(first, last)]
    require(len(segments) < 2, "stop_token", "None where more than one segment is generated", stop_token)
    segment = segments[0] if segments else layout.spans[-1].segment
    stop_token = require_int("stop_token", stop_token, 0, segment.vocab_size - 1)
    return Ending(stop_token, stop_token if segment.pad_token is None else segment.pad_token)


def _require_shape(name: str, tensor: Tensor, tokens: Tensor) -> None:
    same = tensor.shape == tokens.shape
    require(same, name, f"of shape {tuple(tokens.shape)} as the tokens", f"shape {tuple(tensor.shape)}")
