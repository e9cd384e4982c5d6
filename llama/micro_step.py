"""One micro-batch, forward and backward: the loss, and the adapter's gradients added up.

    embed -> layers -> norm -> cross-entropy, with its gradient -> norm' -> layers' -> (nothing)

Each layer keeps its activations for the backward pass, or only its input, from which they are
computed again. On a GPU a shape that comes again is captured into two CUDA graphs, one before the
loss and one after it: an 8B step of 2,048 tokens is 1,500 launches, which take Python longer than
the GPU needs for the work. The loss is left between them, because how many tokens have one differs
from batch to batch.

    M = B T rows, D hidden_size
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.rms_norm import rms_norm, rms_norm_backward
from llama.decoder_layer import Activations, DecoderLayer, Shared
from llama.loss import linear_cross_entropy_with_gradient
from llama.model import Llama, target_rows

Policy = Literal["keep", "recompute"]
# of the shapes that are captured; each holds its launches, some 10 MB
MAX_GRAPHS = 16


@dataclass
class _LayerInput:
    """All that a layer keeps which computes its activations again."""

    r1: Tensor  # (M, D)
    h_down: Tensor  # (M, T of the group)


@dataclass
class _Kept:
    """What the backward pass needs of the forward pass."""

    shared: Shared
    layers: list[Activations | _LayerInput]
    r: Tensor  # (M, D), what the last norm was taken of
    rstd: Tensor  # (M,) float32


@dataclass
class _Captured:
    """A shape's two graphs, and the buffers through which one talks to them."""

    input_ids: Tensor  # (B, T)
    hidden: Tensor  # (M, D): hidden states, then their gradient
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


class MicroStep:
    """The training step of a model without the optimizer.

    Attributes:
        policies: what each layer does with its activations.
    """

    def __init__(self, model: Llama, policies: Sequence[Policy], captures: bool = False) -> None:
        """Prepare for micro-batches of any shape.

        Args:
            captures: replay a shape that comes again as CUDA graphs.
        """
        assert len(policies) == len(model.layers)
        self.model = model
        self.policies = tuple(policies)
        self._seed = torch.zeros(1, dtype=torch.int64, device=model.device)
        self._captures = captures
        self._seen: set[tuple[int, ...]] = set()
        self._captured: dict[tuple[int, ...], _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle() if captures else None

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Tensor,  # (B, T) int64, on the CPU
        labels: Tensor,  # (B, T) int64, on the CPU, -100 where nothing is to be predicted
        factor: Tensor,  # () float32, on the model's device
        dropout_seed: int = 0,
    ) -> Tensor:  # () float32
        """Compute the micro-batch's summed loss, and add its gradients to the adapter's.

            loss  = - sum_(b, t) log p(labels[b, t] | input_ids[b, :t])
            .grad += factor d loss / d adapter

        Note:
            Does not wait for the device.
        """
        device = self.model.device
        rows, targets = (t.to(device, non_blocking=True) for t in target_rows(labels))
        self._seed.fill_(dropout_seed)
        shape = tuple(input_ids.shape)
        captured = self._captured.get(shape)
        if captured is None and shape in self._seen and len(self._captured) < MAX_GRAPHS:
            captured = self._captured[shape] = self._capture(shape)
        self._seen.update([shape] if self._captures else [])
        if captured is not None:
            captured.input_ids.copy_(input_ids, non_blocking=True)
            captured.forward.replay()
            loss = self._loss(captured.hidden, rows, targets, factor)
            captured.backward.replay()
            return loss
        hidden, kept = self._forward(input_ids.to(device, non_blocking=True))
        loss = self._loss(hidden, rows, targets, factor)
        self._backward(hidden, kept)
        return loss

    def _capture(self, shape: tuple[int, ...]) -> _Captured:
        """Record both halves; nothing is computed."""
        input_ids = torch.zeros(shape, dtype=torch.int64, device=self.model.device)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward, pool=self._pool):
            hidden, kept = self._forward(input_ids)
        with torch.cuda.graph(backward, pool=self._pool):
            self._backward(hidden, kept)
        return _Captured(input_ids, hidden, forward, backward)

    def _forward(self, input_ids: Tensor) -> tuple[Tensor, _Kept]:
        model = self.model
        shared = model.shared(input_ids, dropout_seed=self._seed)
        x, delta = model.embed(input_ids), None
        layers: list[Activations | _LayerInput] = []
        for layer, policy in zip(model.layers, self.policies, strict=True):
            x, delta, activations = layer(x, delta, shared, has_backward=policy == "keep")
            layers.append(
                activations if policy == "keep" else _LayerInput(activations.r1, activations.h_down)
            )
        norm = model.model.norm
        hidden, r, rstd = rms_norm(x, norm.weight, norm.eps, delta)
        return hidden, _Kept(shared, layers, r, rstd)

    def _loss(self, hidden: Tensor, rows: Tensor, targets: Tensor, factor: Tensor) -> Tensor:
        """Compute the loss, and turn the hidden states into their gradient."""
        loss, grad = linear_cross_entropy_with_gradient(
            hidden[rows], self.model.head, targets, factor
        )
        # no token without a label has a gradient here
        hidden.zero_().index_copy_(0, rows, grad)
        return loss

    def _backward(self, grad_hidden: Tensor, kept: _Kept) -> None:
        layers, shared = self.model.layers, kept.shared
        M, D = grad_hidden.shape
        tail = max(layer.grad_tail for layer in layers)
        grad_ext = grad_hidden.new_empty(M, D + tail)
        norm = self.model.model.norm
        rms_norm_backward(grad_hidden, None, kept.r, kept.rstd, norm.weight, out=grad_ext[:, :D])
        for layer in reversed(layers):
            activations = self._activations(layer, kept.layers.pop(), shared)
            layer.backward(grad_ext, activations, shared, needs_grad_x=layer.index > 0)
            # before the next layer needs the room
            del activations

    def _activations(
        self, layer: DecoderLayer, kept: Activations | _LayerInput, shared: Shared
    ) -> Activations:
        if isinstance(kept, Activations):
            return kept
        return layer.recompute(kept.r1, kept.h_down, shared)
