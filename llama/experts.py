"""The half of a layer that is a mixture of experts: many small MLPs, of which each token has a few.

    output = sum_j weights[j] down_e(activation(gate_e(y)) up_e(y))        e = chosen[j]

where down_e, gate_e and up_e may have biases, and the router, too.

Shazeer et al. 2017, section 2; Jiang et al. 2024 (Mixtral), section 2.2. `llama/layer.py` runs it
as it runs the MLP of `llama/halves.py`, `llama/routing.py` has the router, and
`lora/expert_group.py` the experts' weights. The MLP's steps are taken for sorted rows, one for each
token and expert of the token. The router is frozen, and the experts but for updates of theirs; the
gradient goes on to y through the experts and through the router.

    M tokens, E experts, k of them a token, R = M k sorted rows, D hidden_size, F intermediate size
"""

from collections.abc import Iterator

from torch import Tensor, nn

from kernels.expert_rows import (
    combine_expert_rows,
    gather_expert_rows,
    weigh_expert_rows_backward,
)
from kernels.glu import Activation, glu, glu_backward
from llama.balance import Balance
from llama.config import LlamaConfig
from llama.halves import Gated
from llama.layer_experts import Experts
from llama.routing import Routing, route, route_backward
from lora.expert_group import ExpertGroup
from lora.expert_update import ExpertUpdate
from lora.rows import Rows
from lora.stacked_layout import StackedLayout


class Routed(Gated):
    """What the backward pass of experts needs; in `gate_up_ext` there is no tail, and each h is of
    the sorted rows."""

    routing: Routing | None = None
    balance: Balance | None = None  # where there is an auxiliary loss
    grad_weights: Tensor  # (M, k) float32, of the router's weights
    grad_h: Tensor  # (R, rank), of h_gate_up


class ExpertProjections(nn.Module):
    """The projections of a layer's experts."""

    def __init__(self, config: LlamaConfig, experts: Experts) -> None:
        super().__init__()
        self.block = experts.block
        D, width, count = config.hidden_size, experts.width, experts.num_experts
        if experts.is_stacked:
            is_by_columns, has_bias = experts.is_by_columns, config.mlp_bias
            layouts = [StackedLayout(is_by_columns, 2 if is_by_columns else 1)]
            layouts.append(StackedLayout(is_by_columns))
            self.gate_up, self.down = (
                ExpertGroup((name,), (rows,), columns, count, count, has_bias, layout)
                for name, rows, columns, layout in (
                    ("gate_up_proj", 2 * width, D, layouts[0]),
                    ("down_proj", D, width, layouts[1]),
                )
            )
            return
        gate_up = tuple(f"{e}.{name}" for e in range(count) for name in ("gate_proj", "up_proj"))
        self.gate_up = ExpertGroup(gate_up, (width,) * len(gate_up), D, count)
        down = tuple(f"{e}.down_proj" for e in range(count))
        self.down = ExpertGroup(down, (D,) * count, width, count)

    def groups(self) -> dict[str, ExpertGroup]:
        """The groups that may have updates, by what transformers calls the experts' tensors."""
        return {"gate_up_proj": self.gate_up, "down_proj": self.down}

    def updates(self) -> Iterator[tuple[str, ExpertGroup, ExpertUpdate]]:
        """The updates, each with its group and what PEFT puts before the names of lora_A and B.

        PEFT wraps the module of the experts once for each tensor: the first wrapper is the base
        layer of the second one.
        """
        found = [(g, g.update) for g in self.groups().values() if g.update is not None]
        for place, (group, update) in enumerate(found, 1):
            yield "base_layer." * (len(found) - place), group, update

    def adapter_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The updates by PEFT's names, as views of the parameters."""
        for before, _, update in self.updates():
            yield f"{before}lora_A.weight", update.lora_A.detach()
            yield f"{before}lora_B.weight", update.lora_B.detach()


class ExpertMLP(nn.Module):
    """A router and the experts that it chooses from, in the place of an MLP."""

    # columns behind the gradient of the output: h of experts is of the sorted rows
    tail = 0

    def __init__(self, config: LlamaConfig, experts: Experts) -> None:
        super().__init__()
        self.choice = (experts.num_chosen, experts.is_normalized)
        # the router, as checkpoints call it
        self.gate = nn.Linear(config.hidden_size, experts.num_experts, config.mlp_bias)
        self.gate.requires_grad_(False)
        self.experts = ExpertProjections(config, experts)
        self.activation: Activation = config.activation

    @property
    def gate_up(self) -> ExpertGroup:
        """The first projections, as an MLP's."""
        return self.experts.gate_up

    @property
    def down(self) -> ExpertGroup:
        """The last projection, as an MLP's."""
        return self.experts.down

    def empty_input(self, num_rows: int, like: Tensor) -> Rows:  # (num_rows, D)
        """Allocate a buffer for the input."""
        return Rows(like.new_empty(num_rows, self.gate.in_features))

    def project_in(self, y: Rows, seed: Tensor | None, kept: Routed) -> None:
        """Choose the experts of each token, and compute gate | up of each pair, (R, 2 F)."""
        router, needs_shares = self.gate, kept.balance is not None
        routing = route(y.ext, router.weight, *self.choice, router.bias, needs_shares)
        kept.routing = routing
        rows = gather_expert_rows(y.ext, routing.places)
        kept.gate_up_ext = self.gate_up.forward(rows, routing.offsets)
        if (update := self.gate_up.update) is not None:
            kept.h_gate_up = update(rows, routing.offsets, kept.gate_up_ext)

    def inner(self, kept: Routed) -> Rows:  # (R, F)
        """Compute activation(gate) up."""
        return Rows(glu(kept.gate_up_ext, self.activation))

    def project_out(self, inner: Rows, seed: Tensor | None, kept: Routed) -> Tensor:  # (M, D)
        """Compute the output of what `inner` returns."""
        routing = kept.routing
        assert routing is not None
        rows, update = self.down.forward(inner.ext, routing.offsets), self.down.update
        kept.h_down = inner.ext.new_empty(0)
        if update is not None:
            kept.h_down = update(inner.ext, routing.offsets, rows)
        return combine_expert_rows(rows, routing.places, routing.weights)

    def inner_backward(self, grad_out: Tensor, seed: Tensor | None, kept: Routed) -> None:
        """Turn gate | up into their gradient, and find that of the router's weights.

            grad_weights[m, j] = grad_out[m] . down_e(inner)
                               = down_e'(grad_out[m]) . inner + grad_out[m] . bias_e

        In the gradients of down's updates the rows have their weights, which h's short rows take.

        Args:
            grad_out: (M, D), of the output.
        """
        routing = kept.routing
        assert routing is not None
        grad_rows = gather_expert_rows(grad_out, routing.places)
        grad_inner, grad_h = self.down.backward(grad_rows, routing.offsets), None
        if (update := self.down.update) is not None:
            weights = routing.weights_of_rows().to(grad_rows.dtype)[:, None]
            grad_h = weights * update.backward(grad_rows, routing.offsets, grad_inner)
            update.accumulate_grad_B(grad_rows, weights * kept.h_down, routing.offsets)
        del grad_rows
        inner = self.inner(kept).ext
        if update is not None and grad_h is not None:
            update.accumulate_grad_A(grad_h, inner, routing.offsets)
        kept.grad_weights = weigh_expert_rows_backward(
            grad_inner, inner, routing.places, routing.weights
        )
        del inner
        if (biases := self.down.biases) is not None:
            with_biases = grad_out.float() @ biases.float().T
            kept.grad_weights += with_biases.gather(1, routing.chosen)
            del with_biases
        glu_backward(grad_inner, kept.gate_up_ext, self.activation)
        del kept.h_down

    def project_in_backward(self, seed: Tensor | None, kept: Routed) -> Tensor:  # (M, D)
        """Compute the gradient of the input."""
        routing, grad_logits = kept.routing, None
        assert routing is not None
        rows = self.gate_up.backward(kept.gate_up_ext, routing.offsets)
        if (update := self.gate_up.update) is not None:
            kept.grad_h = update.backward(kept.gate_up_ext, routing.offsets, rows)
            update.accumulate_grad_B(kept.gate_up_ext, kept.h_gate_up, routing.offsets)
        if kept.balance is not None:
            assert routing.shares is not None
            grad_logits = kept.balance.grad_logits(routing.shares)
        through_router = route_backward(kept.grad_weights, routing, self.gate.weight, grad_logits)
        return combine_expert_rows(rows, routing.places, start=through_router)

    def accumulate_grad_A(self, y: Tensor, seed: Tensor | None, kept: Routed) -> None:
        """Add up the gradient that needs the input, and let go of what was kept."""
        if (update := self.gate_up.update) is not None:
            assert kept.routing is not None
            rows = gather_expert_rows(y, kept.routing.places)
            update.accumulate_grad_A(kept.grad_h, rows, kept.routing.offsets)
            del kept.h_gate_up, kept.grad_h
        del kept.gate_up_ext, kept.grad_weights
        kept.routing = None
