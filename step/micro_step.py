"""One micro-batch, forward and backward: the loss, and the adapter's gradients added up.

    embed -> layers -> norm -> cross-entropy, with its gradient -> norm' -> layers'

Each layer keeps its activations for the backward pass, and its expanded weights too where there is
room; or it keeps only its input, to compute them again; or its input waits in host memory.

On a GPU a shape that comes again is captured into two CUDA graphs, one before the loss and one
after it: an 8B step of 2,048 tokens is 1,500 launches, which take Python longer than the GPU needs
for the work. The loss is between the graphs, because the number of tokens with a label differs from
batch to batch; a shape that is evaluated has one graph, before its loss. All passes, captured or
not, take turns in one pool of memory, which is as large as the largest shape needs, however many
shapes there are. torch's allocator takes the tensors that a captured pass keeps in the pool for
free memory, and a replay overwrites them: so nothing that outlives a pass is made in the pool.
Tables of kernels and cuBLAS's workspaces are made before the first pass, results outside of the
pool.

    M = B T rows, D hidden_size
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

from kernels.capture import recording
from kernels.constants import no_new_constants
from kernels.masked_attention_mask import Samples
from kernels.neftune import neftune_, noise_scale
from llama.activations import Activations, Shared
from llama.balance import Balance
from llama.loss import linear_cross_entropy, linear_cross_entropy_with_gradient
from llama.model import Llama, samples_of, target_rows
from llama.served import as_served
from lora.linear_group import new_rows
from optim.arena import GradientArena
from rows.batch import Batch
from step.captured_shapes import Captured, CapturedShapes
from step.host_stash import HostStash

# from the fastest to the one that takes the least memory
Policy = Literal["expand", "keep", "recompute", "offload"]
POLICIES: dict[str, Policy] = {policy: policy for policy in get_args(Policy)}
KEEPS_ACTIVATIONS: frozenset[Policy] = frozenset(("expand", "keep"))
# tokens to a multiple of which a GPU's batches are padded, so that their shapes come again
PADDED_TOKENS = 64


def padded_tokens(num_tokens: int, device: torch.device) -> int:
    """Count the tokens of a row after it is padded for a device."""
    return num_tokens if device.type == "cpu" else num_tokens + -num_tokens % PADDED_TOKENS


def expand_once(model: Llama, policies: Sequence[Policy]) -> None:
    """Let the weights of layers with that policy stay expanded from pass to pass, and no others."""
    for layer, policy in zip(model.layers, policies, strict=True):
        layer.drop_expanded()
        if policy == "expand":
            layer.keep_expanded(model.compute_dtype)


# for the backward pass: what the layers share, what each keeps, and the last norm's r and rstd
_Kept = tuple[Shared, list[Activations], Tensor, Tensor]


class MicroStep:
    """The training step of a model without the optimizer.

    Attributes:
        gradients: what every micro-batch adds to; captured graphs hold on to its address.
        policies: what each layer does with its activations, and with its expanded weights.
        aux_loss: of the last micro-batch, () float32; the next one overwrites it.
    """

    def __init__(
        self,
        model: Llama,
        gradients: GradientArena,
        policies: Sequence[Policy],
        noise_alpha: float = 0.0,
        captures: bool = False,
        has_aux_loss: bool = False,
    ) -> None:
        """Prepare for micro-batches of any shape.

        Args:
            gradients: of the model's adapter.
            noise_alpha: NEFTune's, of the noise on embeddings; 0: none.
            captures: on a GPU, replay a shape that comes again as CUDA graphs.
            has_aux_loss: a mixture of experts has the auxiliary loss, too.
        """
        assert len(policies) == len(model.layers)
        adapted = zip(model.trainable_parameters(), gradients.parameters.values(), strict=True)
        assert all(own is given for own, given in adapted)
        self.model = model
        self.gradients = gradients
        self.policies = tuple(policies)
        self._noise_alpha = noise_alpha
        self._captures = captures
        self._has_aux_loss = has_aux_loss
        self.aux_loss, self._aux_factor = torch.zeros(2, device=model.device)
        self._trained, self._evaluated = CapturedShapes(), CapturedShapes()
        self._seed = torch.zeros(1, dtype=torch.int64, device=model.device)
        self._hidden = torch.empty(0, dtype=model.compute_dtype, device=model.device)
        offloaded = [i for i, policy in enumerate(policies) if policy == "offload"]
        assert model.device.type == "cuda" or not captures
        assert model.device.type != "cpu" or not offloaded
        self._stash = HostStash(offloaded, model.device) if offloaded else None
        expand_once(model, self.policies)
        if model.device.type == "cuda":
            # torch gives memory back to the stream that it was used on
            self._stream = torch.cuda.Stream(model.device)
            self._pool = torch.cuda.MemPool()
            model.make_tables()
            _make_workspaces(self._stream, model.compute_dtype)

    @torch.no_grad()
    def __call__(
        self,
        batch: Batch,
        factor: Tensor,  # () float32, on the model's device
        dropout_seed: int = 0,
        aux_factor: Tensor | None = None,  # () float32, needed where there is an auxiliary loss
    ) -> Tensor:  # () float32
        """Compute the micro-batch's summed loss, and add its gradients to the arena.

            loss       = - sum_(b, t) log p(labels[b, t] | input_ids[b, :t])
            gradients += factor d loss / d adapter + aux_factor d aux_loss / d adapter

        Note:
            Does not wait for the device.
        """
        self._seed.fill_(dropout_seed)
        batch, given = self._padded(batch)
        if self._noise_alpha:
            assert batch.lengths is not None
            D = self.model.config.hidden_size
            largest = noise_scale(batch.lengths, self._noise_alpha, D)
            # the paper's noise is on embeddings before a multiplier
            given.append(self.model.embedding_multiplier * largest)
        if self._has_aux_loss:
            assert batch.lengths is not None
            assert aux_factor is not None
            self._aux_factor.copy_(aux_factor)
            given.append((batch.lengths > 0).float())
        rows, targets = target_rows(batch.labels)
        if self.model.device.type == "cpu":
            return self._launch(given, rows, targets, factor)
        *given, rows, targets = [self._send(t) for t in (*given, rows, targets)]
        with self._on_stream():
            captured = self._trained.find(given, self._capture) if self._captures else None
            if captured is None:
                return self._launch(given, rows, targets, factor)
            assert captured.backward is not None
            captured.take(given)
            captured.forward.replay()
            loss = self._loss(captured.hidden, rows, targets, factor)
            captured.backward.replay()
            return loss

    def _padded(self, batch: Batch) -> tuple[Batch, list[Tensor]]:
        """Pad a batch as the device needs it, and list what the model is given of it."""
        num_tokens = batch.input_ids.shape[1]
        batch = batch.padded(padded_tokens(num_tokens, self.model.device) - num_tokens)
        places = [] if batch.positions is None else samples_of(batch.positions)
        return batch, [batch.input_ids, *places]

    def _send(self, tensor: Tensor) -> Tensor:
        """Copy a tensor from the CPU to the model's device."""
        if self.model.device.type == "cuda":
            # a copy from memory that is not pinned waits for the device
            tensor = tensor.pin_memory()
        return tensor.to(self.model.device, non_blocking=True)

    def evaluate(self, batch: Batch) -> Tensor:  # () float32
        """Compute a batch's summed loss without dropout, in the memory that training takes.

        The base's products are those of a served model.
        """
        model = self.model
        if model.device.type == "cpu":
            with as_served(model):
                return model.loss(batch)
        batch, given = self._padded(batch)
        *given, rows, targets = [self._send(t) for t in (*given, *target_rows(batch.labels))]
        with self._on_stream():
            captures = self._captures
            captured = self._evaluated.find(given, self._capture_evaluation) if captures else None
            if captured is None:
                hidden = self._hidden_states(given[0])
                with self._pooled():
                    self._evaluate(given, hidden)
            else:
                captured.take(given)
                captured.forward.replay()
                hidden = captured.hidden
            scale, cap = model.config.logit_scale, model.config.final_logit_softcapping
            return linear_cross_entropy(hidden[rows], model.head, targets, scale=scale, cap=cap)

    def _evaluate(self, given: Sequence[Tensor], hidden: Tensor) -> None:
        """Write the hidden states, and keep nothing."""
        input_ids, *places = given
        samples = Samples(*places) if places else None
        with as_served(self.model):
            self.model.hidden_states(input_ids, samples=samples, out=hidden)

    def release(self) -> None:
        """Give the memory of all passes back, that of expanded weights too; later passes begin anew
        and expand the weights each time."""
        for layer in self.model.layers:
            layer.drop_expanded()
        self._trained, self._evaluated = CapturedShapes(), CapturedShapes()
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
        """Run on the stream of the pool, after the caller's stream, which then waits in turn."""
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
            self._backward(hidden, *kept)
        return loss

    def _hidden_states(self, input_ids: Tensor) -> Tensor:
        """View the rows of the buffer for hidden states, later their gradient.

        All shapes share the buffer, through which passes and loss talk to each other. A captured
        shape holds on to its buffer, also when a larger one replaces it.
        """
        M, D = input_ids.numel(), self.model.config.hidden_size
        if self._hidden.numel() < M * D:
            self._hidden = self._hidden.new_empty(M * D)
        return self._hidden[: M * D].view(M, D)

    @contextmanager
    def _pooled(self) -> Iterator[None]:
        """Allocate from the pool of all passes, on a GPU.

        Not for the loss: the allocator takes the tensors that a captured forward pass keeps for the
        backward pass for free memory.
        """
        if self.model.device.type != "cuda":
            yield
            return
        with no_new_constants(), torch.cuda.use_mem_pool(self._pool):
            yield

    def _capture(self, given: Sequence[Tensor]) -> Captured:
        """Record both passes; nothing is computed."""
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        hidden = self._hidden_states(given[0])
        with self._recording(forward):
            kept = self._forward(given, hidden)
        with self._recording(backward):
            self._backward(hidden, *kept)
        host = self._stash.held() if self._stash else []
        return Captured(tuple(given), hidden, host, forward, backward)

    def _capture_evaluation(self, given: Sequence[Tensor]) -> Captured:
        """Record the forward pass of a batch that is evaluated; nothing is computed."""
        forward, hidden = torch.cuda.CUDAGraph(), self._hidden_states(given[0])
        with self._recording(forward):
            self._evaluate(given, hidden)
        return Captured(tuple(given), hidden, [], forward, None)

    @contextmanager
    def _recording(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """Record the launches on this stream into a graph.

        A pass that fails still waits for the stash's copies: without that the capture could not
        end, and torch's allocator would believe it was running ever after.
        """
        with recording(graph, self._pool.id, self._stream):
            try:
                yield
            except BaseException:
                if self._stash is not None:
                    self._stash.abandon()
                raise

    def _forward(self, given: Sequence[Tensor], hidden: Tensor) -> _Kept:
        """Write the hidden states, and return what the backward pass needs.

        Args:
            given: tokens; both tensors of Samples where rows hold several; noise if there is any;
                for an auxiliary loss, which of the tokens are no padding.
        """
        model, stash = self.model, self._stash
        input_ids, *places = given
        balance = None
        if self._has_aux_loss:
            assert model.config.experts is not None
            balance = Balance.of(places.pop().flatten(), model.config.experts)
        noise = places.pop() if self._noise_alpha else None
        samples = Samples(*places) if places else None
        shared = model.shared(input_ids, dropout_seed=self._seed, samples=samples)
        shared = shared._replace(balance=balance)
        x, delta = model.embed(input_ids), None
        if noise is not None:
            neftune_(x, noise.flatten(), self._seed)
        if stash is not None:
            stash.reserve(x)
        kept: list[Activations] = []
        for layer, policy in zip(model.layers, self.policies, strict=True):
            has_backward = policy in KEEPS_ACTIVATIONS
            x, delta, own = layer.forward(x, delta, shared, has_backward=has_backward)
            if policy == "offload":
                assert stash is not None
                stash.put(layer.index, own.r1)
                del own.r1
            kept.append(own)
        if balance is not None:
            self.aux_loss.copy_(balance.loss())
        if stash is not None:
            stash.settle()
        _, r, rstd = model.decoder.norm(x, delta, out=hidden)
        return shared, kept, r, rstd

    def _loss(self, hidden: Tensor, rows: Tensor, targets: Tensor, factor: Tensor) -> Tensor:
        """Compute the loss, and turn the hidden states into their gradient."""
        config = self.model.config
        scale, cap = config.logit_scale, config.final_logit_softcapping
        loss, grad = linear_cross_entropy_with_gradient(
            hidden[rows], self.model.head, targets, factor, scale=scale, cap=cap
        )
        # a token without a label has none
        hidden.zero_().index_copy_(0, rows, grad)
        return loss

    def _backward(
        self,
        grad_hidden: Tensor,  # (M, D)
        shared: Shared,
        kept: list[Activations],
        r: Tensor,  # (M, D)
        rstd: Tensor,  # (M,) float32
    ) -> None:
        """Add the adapter's gradients up, from the last layer to the first; `kept` is used up."""
        layers, stash = self.model.layers, self._stash
        M, D = grad_hidden.shape
        tail = max(layer.grad_tail for layer in layers)
        grad_ext = new_rows(grad_hidden, M, D + tail)
        norm = self.model.decoder.norm
        norm.backward(grad_hidden, None, r, rstd, out=grad_ext[:, :D])
        if shared.balance is not None:
            shared.balance.begin_backward(self._aux_factor)
        if stash is not None:
            stash.fetch_next(grad_hidden)
        for layer, policy in zip(reversed(layers), reversed(self.policies), strict=True):
            own = kept.pop()
            if policy == "offload":
                assert stash is not None
                own.r1 = stash.take(layer.index)
                # the input of the layer below comes while this layer is computed
                stash.fetch_next(own.r1)
            if policy not in KEEPS_ACTIVATIONS:
                own = layer.recompute(own, shared)
            layer.backward(grad_ext, own, shared, needs_grad_x=layer.index > 0)
            del own


def _make_workspaces(stream: torch.cuda.Stream, dtype: torch.dtype) -> None:
    """Let cuBLAS take what it keeps for a stream, before a pass lets it do so in the pool."""
    with torch.cuda.stream(stream):
        a = torch.zeros(256, 256, dtype=dtype, device=stream.device)
        torch.mm(a, a)
        # products with a bias are cublasLt's, which has a workspace of its own
        torch.addmm(a[0], a, a)
