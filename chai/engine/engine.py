"""Generate text over a cache of reserved length; from the first token to the last, the host reads tokens at most."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chai.engine.attention import Visible
from chai.engine.decoder import Decoder
from chai.engine.graphs import Graphs
from chai.engine.request import Request
from chai.engine.sampling import Sampling, next_tokens
from chai.engine.stopping import Stopping
from chai.engine.streaming import TokenReader
from chai.engine.support import check_method, check_model, check_number, least_window, vocabulary_size
from chai.engine.warm_up import WarmUp, cluster_without_tokens
from chai.kernels import available
from chai.methods import baseline
from chai.methods.base import Method
from chai.methods.clustering import ClusteringMethod
from chai.patching.devices import input_device

#: Capacities are multiples of this number of tokens.
STEP = 64
#: Lengths of a decode step's attention in a CUDA graph are rounded up to a multiple of this, or of an eighth of the
#: length where that is more.
BUCKET = 256

#: Called with the tokens of each step, long ``[B]`` on the CPU.
OnToken = Callable[[Tensor], object]
F = TypeVar("F", bound=Callable[..., Any])


def _in_engine(function: F) -> F:
    """Run on the engine's device, without gradients and autocast, outside of inference mode (buffers stay)."""

    @functools.wraps(function)
    def wrapper(engine: Engine, *args: Any, **kwargs: Any) -> Any:
        device = input_device(engine.model) if "model" in vars(engine) else torch.device("cpu")
        place = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False), place:
            return function(engine, *args, **kwargs)

    return cast("F", wrapper)


def _one_at_a_time(function: F) -> F:
    """Run as :func:`_in_engine`, and refuse a call while another one runs (ValueError)."""

    @functools.wraps(function)
    def wrapper(engine: Engine, *args: Any, **kwargs: Any) -> Any:
        if not engine._running.acquire(blocking=False):
            raise ValueError("this engine runs a request (an on_token, or another thread); valid: calls after its end")
        try:
            return function(engine, *args, **kwargs)
        finally:
            engine._running.release()

    return _in_engine(cast("F", wrapper))


class Engine:
    """A model and a method with a cache of reserved length, for one request after the other.

    While it is open, the weights of the projections lie side by side in buffers, and the model's parameters are views
    of them: nothing is stored twice, and the model itself works as before. :meth:`close`, or the end of a ``with``
    block, gives the parameters storage of their own again. Cache, buffers and CUDA graphs stay for later requests.

    Args:
        model: A causal language model of transformers, of one of :data:`chai.engine.support.FAMILIES`.
        method: Multi-head attention (the default) or a method that clusters heads.
        batch_size: Rows of each request.
        max_length: Tokens of prompt and generation together, rounded up to a multiple of 64.
        kernels: Whether Triton kernels run; ``None``: on a CUDA device.

    Raises:
        ValueError: The engine does not run this model or this method; the message names what is valid.
    """

    @_in_engine
    def __init__(
        self,
        model: PreTrainedModel,
        method: Method | None = None,
        batch_size: int = 1,
        max_length: int = 4096,
        *,
        kernels: bool | None = None,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            check_number(name, value)
        self.model, self.method = model, baseline() if method is None else method
        check_method(self.method)
        check_model(model, max_length)
        capacity = -(-max_length // STEP) * STEP
        #: Tokens of prompt and generation together: what is reserved, as far as no sliding window is shorter.
        self.max_length = min(capacity, least_window(model) or capacity)
        self.method.check(model.config)
        self.method.check_weights(model)
        device = input_device(model)
        if kernels and not available(device):
            raise ValueError(
                f"kernels=True needs Triton and a CUDA device; the model is on {device}; valid: None, False"
            )
        kernels = device.type == "cuda" and available(device) if kernels is None else kernels
        self._generator = torch.Generator(device)
        self._graphs = Graphs(device, self._generator, captures=kernels and device.type == "cuda")
        self._finished = torch.zeros(batch_size, dtype=torch.bool, device=device)
        self._stops: dict[tuple[int, ...], Tensor] = {}
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._running = threading.Lock()
        self._request: Request | None = None
        self._warm_up: WarmUp | None = None
        self._decoder: Decoder | None = Decoder(model, self.method, batch_size, capacity, kernels)
        try:
            clustered = any(layer.clusters is not None for layer in self._decoder.layers)
            if clustered and isinstance(self.method, ClusteringMethod):
                if self.method.warmup_tokens:
                    self._warm_up = WarmUp(self._decoder, self.method)
                else:
                    cluster_without_tokens(self._decoder, self.method)
        except BaseException:
            self.close()
            raise
        if device.type == "cuda":
            torch.cuda.empty_cache()  # of the weights that lie in buffers now

    # Life.

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @_one_at_a_time
    def close(self) -> None:
        """Free graphs, cache and buffers, and give the model's parameters storage of their own again."""
        self._graphs = Graphs(torch.device("cpu"), self._generator, captures=False)
        decoder, self._decoder = self._decoder, None
        self._request = self._warm_up = None
        if decoder is not None:
            decoder.restore()

    @property
    def decoder(self) -> Decoder:
        """The layers with their cache (ValueError: the engine is closed)."""
        if self._decoder is None:
            raise ValueError("this engine is closed; valid: a new one")
        return self._decoder

    @property
    def cache_bytes(self) -> int:
        """Bytes of the reserved cache."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.decoder.layers)

    # Requests.

    @_one_at_a_time
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int = 20,
        *,
        attention_mask: Tensor | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop_tokens: int | Iterable[int] | None = None,
        on_token: OnToken | None = None,
    ) -> Tensor:
        """Generate up to ``max_new_tokens`` tokens for each row.

        Args:
            ids: long ``[B, T]``, the prompts.
            max_new_tokens: Fewer are generated if all rows have ended with a stop token.
            attention_mask: ``[B, T]``, 0 for padding, which is on the left; ``None``: no padding.
            temperature: See :class:`chai.engine.sampling.Sampling`; 0 is greedy.
            top_k: See :class:`chai.engine.sampling.Sampling`.
            top_p: See :class:`chai.engine.sampling.Sampling`.
            seed: Of the sampling.
            stop_tokens: A row ends with any of these; ``None``: the ``eos_token_id`` of the model's generation
                configuration; ``()``: none. With stop tokens, the host reads those of each step.
            on_token: Called in order with the tokens of each step, long ``[B]`` on the CPU, while the device runs the
                next step. An exception ends the generation and is raised. It may not call the engine.

        Returns:
            Long ``[B, T + new]``: prompts, and generated tokens. Ended rows are filled with the padding token.

        Raises:
            ValueError: An argument outside what is valid.
        """
        sampling, stopping = Sampling(temperature, top_k, top_p), Stopping.read(self.model, stop_tokens)
        check_number("max_new_tokens", max_new_tokens)
        with self._whole_or_nothing():
            request = self._begin(ids, attention_mask, max_new_tokens)
            self._generator.manual_seed(seed)
            self._finished.zero_()
            if stopping.tokens not in self._stops:  # before the prompt: the host waits for a copy
                self._stops[stopping.tokens] = torch.tensor(
                    stopping.tokens, dtype=torch.long, device=self.decoder.device
                )
            self._run_prompt()
            return self._generate(request.length, max_new_tokens, sampling, stopping, on_token)

    def _generate(
        self, first: int, max_new_tokens: int, sampling: Sampling, stopping: Stopping, on_token: OnToken | None
    ) -> Tensor:
        """Generate after a prompt of ``first`` tokens; see :meth:`generate`."""
        decoder, count, stops = self.decoder, 0, stopping.tokens
        reader = TokenReader(decoder.sequence, self._copies) if on_token is not None or stops else None
        ended = torch.zeros(decoder.batch_size, dtype=torch.bool)

        def deliver() -> bool:
            """Read the next step's tokens; whether all rows have ended."""
            nonlocal count
            assert reader is not None
            tokens = reader.read(first + count)
            count += 1
            if on_token is not None:
                on_token(tokens)
            ended.logical_or_(torch.isin(tokens, torch.tensor(stops)))
            return bool(ended.all())

        for step in range(max_new_tokens):
            if step:
                self._advance()
            self._choose(sampling, stopping)
            if reader is not None:
                reader.mark(first + step)
                if step >= reader.lag and deliver():
                    break
        else:
            while reader is not None and count < max_new_tokens and not deliver():
                pass
        new = count if reader is not None else max_new_tokens
        return decoder.sequence[: first + new].t().clone(memory_format=torch.contiguous_format)

    @_one_at_a_time
    def prefill(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Start a request: run the prompts ``[B, T]`` and return the logits of the next tokens, ``[B, V]``."""
        with self._whole_or_nothing():
            self._begin(ids, attention_mask, 0)
            self._run_prompt()
        return self.decoder.logits.clone()

    @_one_at_a_time
    def decode_step(self, tokens: Tensor | None = None) -> Tensor:
        """Go on with one token of each row, long ``[B]``, and return the logits of the next ones, ``[B, V]``.

        ``None`` takes the most probable tokens.
        """
        decoder = self.decoder
        if self._request is None:
            raise ValueError("no request has been started; valid: prefill() first")
        if self._request.length >= self.max_length:
            raise ValueError(
                f"the cache is full ({self.max_length} tokens); valid: an engine with a greater max_length"
            )
        if tokens is not None:
            _check_tokens(tokens, decoder)
        with self._whole_or_nothing():
            if tokens is None:
                self._choose(Sampling(), Stopping())
            else:
                decoder.token.copy_(tokens)
                decoder.sequence[self._request.length].copy_(decoder.token)
            self._advance()
        return decoder.logits.clone()

    @_one_at_a_time
    def repeated_step(self, length: int) -> Callable[[], None]:
        """Return a function that runs the decode step of token ``length`` anew at each call (for benchmarks).

        The request goes on with random keys and values, on which the time of a step does not depend. If kernels run on
        a CUDA device, the step is a graph. The function holds nothing but the engine; once this is closed, it raises a
        ValueError.
        """
        check_number("length", length)
        decoder, request = self.decoder, self._request
        if request is None or not request.warmup_tokens < request.shortest <= length - 1 < self.max_length:
            raise ValueError(
                f"length is {length}; valid: up to {self.max_length}, and more than the tokens of a request that was "
                "started with more than the warm-up tokens"
            )
        for layer in decoder.layers:
            for states in (layer.keys, layer.values):
                states[:, :, request.length : length].normal_()
        shared, padded = request.shared, request.padded
        with self._whole_or_nothing():
            self._repeat(length, shared, padded)
        request.length = length
        return functools.partial(_one_at_a_time(Engine._repeat), self, length, shared, padded)

    def _repeat(self, length: int, shared: bool, padded: bool) -> None:
        decoder = self.decoder

        def step() -> None:
            decoder.position.fill_(length - 1)
            decoder.step(length, True, padded)

        self._graphs.run(("repeated", length, shared, padded), step)

    # Steps.

    @contextmanager
    def _whole_or_nothing(self) -> Iterator[None]:
        """Forget the request if the block fails: its cache is written in part."""
        try:
            yield
        except BaseException:
            self._request = None
            raise

    def _begin(self, ids: Tensor, attention_mask: Tensor | None, new_tokens: int) -> Request:
        """Read a request on the host, and copy it to the device."""
        decoder, self._request = self.decoder, None
        warmup_tokens = 0 if self._warm_up is None else self._warm_up.tokens
        request = Request.read(ids, attention_mask, warmup_tokens)
        request.check(decoder.batch_size, self.max_length - new_tokens, len(decoder.embedding))
        decoder.sequence[: request.length].copy_(ids.t())
        decoder.starts.copy_(torch.tensor(request.starts, dtype=torch.int32))
        self._request = request
        return request

    def _run_prompt(self) -> None:
        """Run all tokens so far; writes the logits."""
        decoder, request, warm_up = self.decoder, self._request, self._warm_up
        assert request is not None
        length, tokens = request.length, request.warmup_tokens
        whole = request.longest > tokens  # some token comes after the warm-up
        ends_early = request.shortest <= tokens  # some row's last token belongs to it
        visible = Visible(
            length, length, decoder.starts if request.padded else None, None, decoder.device, decoder.kernels
        )
        x, y, last = decoder.embed(decoder.sequence[:length].t()), cast("Tensor | None", None), decoder.layers[-1]
        # The chain of warm-up tokens begins where the prompt would not compute the same.
        begin = decoder.first_clustered if whole and request.shortest >= tokens else 0
        for layer in decoder.layers:
            if warm_up is not None and layer.index == begin:
                warm_up.begin_after(x, y) if begin else warm_up.begin()
            if warm_up is not None and layer.index >= begin:
                warm_up.advance(layer, request.shared, leave=ends_early or layer is not last)
            if whole:
                skip = tokens if layer.index >= begin else 0
                x, y = decoder.prompt_layer(layer, x, y, visible, skip, layer is last)
        hidden = decoder.last_norm(x, y)[:, 0] if whole else None
        if warm_up is not None and ends_early:
            warm_up.finish()
            first = warm_up.last_hidden(length)
            complete = length - decoder.starts > tokens  # rows whose last token comes after their warm-up
            hidden = first if hidden is None else torch.where(complete[:, None], hidden, first)
        assert hidden is not None
        decoder.write_logits(hidden)
        decoder.position.fill_(length)

    def _advance(self) -> None:
        """Run the chosen tokens; writes the logits."""
        request = self._request
        assert request is not None
        if request.shortest < request.warmup_tokens:  # some row has no clusters yet
            request.append()
            self._run_prompt()
            return
        self._step(request, request.length + 1)
        request.append()

    def _step(self, request: Request, length: int) -> None:
        """Run the decode step after which the cache has ``length`` tokens."""
        decoder = self.decoder
        if decoder.kernels:
            span = min(bucket(length), decoder.capacity)
        elif decoder.device.type == "cpu" and decoder.logits.dtype.itemsize == 2:  # oneDNN compiles each length anew
            span = -(-length // STEP) * STEP
        else:
            decoder.step(length, True, request.padded)
            return
        key = ("step", span, request.shared, request.padded)
        self._graphs.run(key, lambda: decoder.step(span, False, request.padded))

    def _choose(self, sampling: Sampling, stopping: Stopping) -> None:
        """Choose the next tokens by the logits, and append them to the sequence."""
        decoder, stops = self.decoder, stopping.tokens

        def choose() -> None:
            tokens = next_tokens(decoder.logits, sampling, self._generator)
            if stops:
                tokens = tokens.masked_fill(self._finished, stopping.pad)
                self._finished.logical_or_((tokens[:, None] == self._stops[stops]).any(1))
            decoder.token.copy_(tokens)
            decoder.sequence.index_copy_(0, decoder.place, tokens[None])

        self._graphs.run(("choose", sampling, stopping), choose)


def _check_tokens(tokens: Tensor, decoder: Decoder) -> None:
    """Refuse what is no token of each row (ValueError); values are only read if they are on the CPU."""
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.long, torch.int32):
        kind = str(tokens.dtype).removeprefix("torch.") if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"tokens are {kind}; valid: a tensor of int64 or int32")
    if tokens.shape != decoder.token.shape:
        raise ValueError(f"tokens are {tuple(tokens.shape)}; valid: {tuple(decoder.token.shape)}")
    if tokens.device.type == "cpu":
        lowest, highest, vocabulary = int(tokens.min()), int(tokens.max()), len(decoder.embedding)
        if lowest < 0 or highest >= vocabulary:
            raise ValueError(f"tokens are {lowest} to {highest}; valid: 0 to {vocabulary - 1}")


def bucket(length: int) -> int:
    """Round a length up to a multiple of 256, or of about an eighth of it: few graphs, little masked work."""
    step = max(BUCKET, length // 8 // BUCKET * BUCKET)
    return -(-length // step) * step


def generate(
    model: PreTrainedModel,
    ids: Tensor,
    method: Method | None = None,
    max_new_tokens: int = 20,
    *,
    attention_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_tokens: int | Iterable[int] | None = None,
    on_token: OnToken | None = None,
    kernels: bool | None = None,
) -> Tensor:
    """Generate text in an :class:`Engine` of its own; arguments as of :class:`Engine` and :meth:`Engine.generate`."""
    # What is refused is refused before any weight is moved.
    check_number("max_new_tokens", max_new_tokens)
    Sampling(temperature, top_k, top_p)
    Stopping.read(model, stop_tokens)
    request = Request.read(ids, attention_mask, 0)
    request.check(request.batch_size, request.length, vocabulary_size(model))
    max_length = request.length + max_new_tokens
    with Engine(model, method, request.batch_size, max_length, kernels=kernels) as engine:
        return engine.generate(
            ids,
            max_new_tokens,
            attention_mask=attention_mask,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop_tokens=stop_tokens,
            on_token=on_token,
        )
