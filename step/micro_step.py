"""One micro-batch, forward and backward: the loss, and the adapter's gradients added up.

    embed -> layers -> norm -> cross-entropy, with its gradient -> norm' -> layers' -> (nothing)

Each layer keeps its activations for the backward pass; or only its input, from which they are
computed again; or not even that, because the input waits on the host.

On a GPU a shape that comes again is captured into two CUDA graphs, one before the loss and one
after it: an 8B step of 2,048 tokens is 1,500 launches, which take Python longer than the GPU needs
for the work. The loss is left between them, because how many tokens have one differs from batch to
batch. All passes, captured or not, take turns in one pool of memory, so that however many shapes
there are, it is as large as the largest needs. To torch's allocator, what a captured pass keeps
there is free, and a replay writes over it: so nothing that outlives a pass is made in the pool.
Tables of kernels and cuBLAS's workspaces are made before the first pass, results outside of it.

    M = B T rows, D hidden_size
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.constants import no_new_constants
from kernels.masked_attention_mask import Samples
from kernels.neftune import neftune_, noise_scale
from llama.layer import Activations, DecoderLayer, LayerInput, Shared
from llama.loss import linear_cross_entropy, linear_cross_entropy_with_gradient
from llama.model import Llama, samples_of, target_rows
from step.host_stash import HostStash

Policy = Literal["keep", "recompute", "offload"]
POLICIES: dict[str, Policy] = {policy: policy for policy in get_args(Policy)}
# of the shapes that are captured; each holds its launches, some 10 MB
MAX_GRAPHS = 32
# tokens to a multiple of which a GPU's batches are padded, so that their shapes come again
PADDED_TOKENS = 64


def padded_tokens(num_tokens: int, device: torch.device) -> int:
    """Count the tokens that samples of a length are computed with.

    The padding comes last, so no real token sees it, and it has no loss.
    """
    return num_tokens if device.type == "cpu" else num_tokens + -num_tokens % PADDED_TOKENS


class _Offloaded(NamedTuple):
    """What is left of a layer's input while the rest waits on the host."""

    h_down: Tensor  # (M, T of the group)


@dataclass
class _Kept:
    """What the backward pass needs of the forward pass."""

    shared: Shared
    layers: list[Activations | LayerInput | _Offloaded]
    r: Tensor  # (M, D), what the last norm was taken of
    rstd: Tensor  # (M,) float32


@dataclass(frozen=True)
class _Captured:
    """A shape's two graphs, and the memory through which one talks to them."""

    given: tuple[Tensor, ...]  # (B, T) each, as `_forward` takes them
    hidden: Tensor  # (M, D), of the step's buffer
    host: list[Tensor]
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


class MicroStep:
    """The training step of a model without the optimizer.

    Attributes:
        policies: what each layer does with its activations.
    """

    def __init__(
        self,
        model: Llama,
        policies: Sequence[Policy],
        noise_alpha: float = 0.0,
        captures: bool = False,
    ) -> None:
        """Prepare for micro-batches of any shape.

        Args:
            noise_alpha: NEFTune's, of the noise on embeddings; 0: none.
            captures: on a GPU, replay a shape that comes again as CUDA graphs.
        """
        assert len(policies) == len(model.layers)
        self.model = model
        self.policies = tuple(policies)
        self._noise_alpha = noise_alpha
        self._captures = captures
        self._seen: set[tuple[int, ...]] = set()
        self._captured: dict[tuple[int, ...], _Captured] = {}
        self._seed = torch.zeros(1, dtype=torch.int64, device=model.device)
        self._hidden = torch.empty(0, dtype=model.compute_dtype, device=model.device)
        offloaded = [i for i, policy in enumerate(policies) if policy == "offload"]
        assert model.device.type == "cuda" or not captures
        assert model.device.type != "cpu" or not offloaded
        self._stash = HostStash(offloaded, model.device) if offloaded else None
        if model.device.type == "cuda":
            # torch gives memory back to the stream that it was used on
            self._stream = torch.cuda.Stream(model.device)
            self._pool = torch.cuda.MemPool()
            model.make_tables()
            _make_workspaces(self._stream, model.compute_dtype)

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Tensor,  # (B, T) int64, on the CPU
        labels: Tensor,  # (B, T) int64, on the CPU, -100 where nothing is to be predicted
        factor: Tensor,  # () float32, on the model's device
        dropout_seed: int = 0,
        positions: Tensor | None = None,  # (B, T) int64, on the CPU
        lengths: Tensor | None = None,  # (B, T) int64, on the CPU
    ) -> Tensor:  # () float32
        """Compute the micro-batch's summed loss, and add its gradients to the adapter's.

            loss  = - sum_(b, t) log p(labels[b, t] | input_ids[b, :t])
            .grad += factor d loss / d adapter

        Args:
            positions: of the tokens in their samples, if a row holds several; each begins with a
                token at position 0, which has no label.
            lengths: of the sample that a token is of, 0 for padding; needed for noise only.

        Note:
            Does not wait for the device.
        """
        self._seed.fill_(dropout_seed)
        device = self.model.device
        num_padding = padded_tokens(input_ids.shape[1], device) - input_ids.shape[1]
        given = [F.pad(input_ids, (0, num_padding))]
        if positions is not None:
            given += samples_of(F.pad(positions, (0, num_padding)))
        if self._noise_alpha:
            assert lengths is not None
            scale = noise_scale(lengths, self._noise_alpha, self.model.config.hidden_size)
            given.append(F.pad(scale, (0, num_padding)))
        rows, targets = target_rows(F.pad(labels, (0, num_padding), value=-100))
        if device.type == "cpu":
            return self._launch(given, rows, targets, factor)
        *given, rows, targets = [self._send(t) for t in (*given, rows, targets)]
        with self._on_stream():
            captured = self._captured_for(given)
            if captured is None:
                return self._launch(given, rows, targets, factor)
            for place, tensor in zip(captured.given, given, strict=True):
                place.copy_(tensor)
            captured.forward.replay()
            loss = self._loss(captured.hidden, rows, targets, factor)
            captured.backward.replay()
            return loss

    def _send(self, tensor: Tensor) -> Tensor:
        """Copy a tensor from the CPU to the model's device."""
        if self.model.device.type == "cuda":
            # a copy from memory that is not pinned waits for the device
            tensor = tensor.pin_memory()
        return tensor.to(self.model.device, non_blocking=True)

    def evaluate(
        self, input_ids: Tensor, labels: Tensor, positions: Tensor | None = None
    ) -> Tensor:  # () float32
        """Compute a batch's summed loss without dropout, in the memory that training takes."""
        model = self.model
        if model.device.type == "cpu":
            return model.loss(input_ids, labels, positions)
        places = [] if positions is None else samples_of(positions)
        given = (input_ids, *places, *target_rows(labels))
        ids, *places, rows, targets = [self._send(tensor) for tensor in given]
        with self._on_stream():
            hidden = self._hidden_states(ids)
            with self._pooled():
                model.hidden_states(ids, samples=Samples(*places) if places else None, out=hidden)
            return linear_cross_entropy(
                hidden[rows], model.head, targets, model.config.final_logit_softcapping
            )

    def release(self) -> None:
        """Give the memory of all passes back; the next begin anew."""
        self._captured.clear()
        self._seen.clear()
        self._hidden = self._hidden.new_empty(0)
        if self._stash is not None:
            self._stash.abandon()
            self._stash = HostStash(self._stash.layers, self.model.device)
        if self.model.device.type == "cuda":
            # a failed pass and its error may hold each other
            gc.collect()
            self._pool = torch.cuda.MemPool()
            torch.cuda.empty_cache()

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """Run on the stream that the pool's memory belongs to, in turn with the caller's."""
        if self.model.device.type != "cuda":
            yield
            return
        main = torch.cuda.current_stream()
        self._stream.wait_stream(main)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            main.wait_stream(self._stream)

    def _launch(
        self, given: Sequence[Tensor], rows: Tensor, targets: Tensor, factor: Tensor
    ) -> Tensor:
        """Run both passes kernel by kernel."""
        hidden = self._hidden_states(given[0])
        with self._pooled():
            kept = self._forward(given, hidden)
        loss = self._loss(hidden, rows, targets, factor)
        with self._pooled():
            self._backward(hidden, kept)
        return loss

    def _hidden_states(self, input_ids: Tensor) -> Tensor:
        """View the rows of the buffer for hidden states, later their gradient.

        One for all shapes: between the passes it is all that the loss and they have in common. A
        captured shape knows where it is, and holds on to it where a larger one takes its place.
        """
        M, D = input_ids.numel(), self.model.config.hidden_size
        if self._hidden.numel() < M * D:
            self._hidden = self._hidden.new_empty(M * D)
        return self._hidden[: M * D].view(M, D)

    @contextmanager
    def _pooled(self) -> Iterator[None]:
        """Take memory from the pool that the captured passes have theirs from, on a GPU.

        Not for the loss: to the allocator, what a captured forward pass keeps for the backward pass
        is free.
        """
        if self.model.device.type != "cuda":
            yield
            return
        with no_new_constants(), torch.cuda.use_mem_pool(self._pool):
            yield

    def _captured_for(self, given: Sequence[Tensor]) -> _Captured | None:
        """Find a shape's graphs, recording them when it comes for the second time.

        By then its kernels are compiled and all constants are on the device.
        """
        shape = (len(given), *given[0].shape)
        is_known = shape in self._seen
        if self._captures:
            self._seen.add(shape)
        if is_known and shape not in self._captured and len(self._captured) < MAX_GRAPHS:
            self._captured[shape] = self._capture([torch.zeros_like(x) for x in given])
        return self._captured.get(shape)

    def _capture(self, given: Sequence[Tensor]) -> _Captured:
        """Record both passes; nothing is computed."""
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        hidden = self._hidden_states(given[0])
        with self._recording(forward):
            kept = self._forward(given, hidden)
        with self._recording(backward):
            self._backward(hidden, kept)
        host = self._stash.held() if self._stash else []
        return _Captured(tuple(given), hidden, host, forward, backward)

    @contextmanager
    def _recording(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """Record into a graph what this stream is given.

        A pass that fails is ended as any other: where copies of the stash were not awaited the
        capture could not end, and torch's allocator would take it for running ever after.
        """
        # the stubs of torch 2.13 want a type that its own pools do not have
        pool: Any = self._pool.id
        with no_new_constants(), torch.cuda.graph(graph, pool=pool, stream=self._stream):
            try:
                yield
            except BaseException:
                if self._stash is not None:
                    self._stash.abandon()
                raise

    def _forward(self, given: Sequence[Tensor], hidden: Tensor) -> _Kept:
        """Write the hidden states, and return what the backward pass needs.

        Args:
            given: tokens; where rows hold several samples, their two places; noise if there is any.
        """
        model, stash = self.model, self._stash
        input_ids, *places = given
        noise = places.pop() if self._noise_alpha else None
        samples = Samples(*places) if places else None
        shared = model.shared(input_ids, dropout_seed=self._seed, samples=samples)
        x, delta = model.embed(input_ids), None
        if noise is not None:
            neftune_(x, noise.flatten(), self._seed)
        if stash is not None:
            stash.reserve(x)
        layers: list[Activations | LayerInput | _Offloaded] = []
        for layer, policy in zip(model.layers, self.policies, strict=True):
            x, delta, kept = layer.forward(x, delta, shared, has_backward=policy == "keep")
            if policy == "offload":
                assert stash is not None
                assert isinstance(kept, LayerInput)
                stash.put(layer.index, kept.r1)
                kept = _Offloaded(kept.h_down)
            layers.append(kept)
        if stash is not None:
            stash.settle()
        _, r, rstd = model.model.norm(x, delta, out=hidden)
        return _Kept(shared, layers, r, rstd)

    def _loss(self, hidden: Tensor, rows: Tensor, targets: Tensor, factor: Tensor) -> Tensor:
        """Compute the loss, and turn the hidden states into their gradient."""
        cap = self.model.config.final_logit_softcapping
        loss, grad = linear_cross_entropy_with_gradient(
            hidden[rows], self.model.head, targets, factor, cap
        )
        # a token without a label has none
        hidden.zero_().index_copy_(0, rows, grad)
        return loss

    def _backward(self, grad_hidden: Tensor, kept: _Kept) -> None:
        layers, shared, stash = self.model.layers, kept.shared, self._stash
        M, D = grad_hidden.shape
        tail = max(layer.grad_tail for layer in layers)
        grad_ext = grad_hidden.new_empty(M, D + tail)
        norm = self.model.model.norm
        norm.backward(grad_hidden, None, kept.r, kept.rstd, out=grad_ext[:, :D])
        if stash is not None:
            stash.fetch_next(grad_hidden)
        for layer in reversed(layers):
            activations = self._activations(layer, kept.layers.pop(), shared)
            layer.backward(grad_ext, activations, shared, needs_grad_x=layer.index > 0)
            del activations

    def _activations(
        self, layer: DecoderLayer, kept: Activations | LayerInput | _Offloaded, shared: Shared
    ) -> Activations:
        if isinstance(kept, Activations):
            return kept
        if isinstance(kept, _Offloaded):
            assert self._stash is not None
            r1 = self._stash.take(layer.index)
            # the one that is needed next comes beside this one's computation
            self._stash.fetch_next(r1)
            kept = LayerInput(r1, kept.h_down)
        return layer.recompute(kept, shared)


def _make_workspaces(stream: torch.cuda.Stream, dtype: torch.dtype) -> None:
    """Let cuBLAS take what it keeps for a stream, before a pass lets it do so in the pool."""
    with torch.cuda.stream(stream):
        a = torch.zeros(256, 256, dtype=dtype, device=stream.device)
        torch.mm(a, a)
        # products with a bias are cublasLt's, which has a workspace of its own
        torch.addmm(a[0], a, a)
