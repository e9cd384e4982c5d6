"""The half of a layer that is a mixture of experts: many small MLPs, of which each token has a few.

    output = sum_j weights[j] down_e(activation(gate_e(y)) up_e(y))        e = chosen[j]

where down_e, gate_e and up_e may have biases, and the router, too.

Shazeer et al. 2017, section 2; Jiang et al. 2024 (Mixtral), section 2.2. `llama/layer.py` runs it
as it runs the MLP of `llama/halves.py`, `llama/routing.py` has the router, and
`lora/expert_group.py` the experts' weights. The MLP's steps are taken for sorted rows, one for each
token and expert of the token. Nothing of it trains; the gradient goes on to y through the experts
and through the router.

    M tokens, E experts, k of them a token, R = M k sorted rows, D hidden_size, F intermediate size
"""

from torch import Tensor, nn

from kernels.expert_rows import (
    combine_expert_rows,
    gather_expert_rows,
    weigh_expert_rows_backward,
)
from kernels.glu import Activation, glu, glu_backward
from llama.config import LlamaConfig
from llama.halves import Gated
from llama.layer_experts import Experts
from llama.routing import Routing, route, route_backward
from lora.expert_group import ExpertGroup
from lora.rows import Rows
from lora.stacked_layout import StackedLayout


class Routed(Gated):
    """What the backward pass of experts needs; in `gate_up_ext` there is no tail."""

    routing: Routing | None = None
    grad_weights: Tensor  # (M, k) float32, of the router's weights


class ExpertProjections(nn.Module):
    """The projections of a layer's experts."""

    def __init__(self, config: LlamaConfig, experts: Experts) -> None:
        super().__init__()
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


class ExpertMLP(nn.Module):
    """A router and the experts that it chooses from, in the place of an MLP."""

    # columns behind the gradient of the output: experts have no updates
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
        routing = kept.routing = route(y.ext, self.gate.weight, *self.choice, self.gate.bias)
        rows = gather_expert_rows(y.ext, routing.places)
        kept.gate_up_ext = self.gate_up.forward(rows, routing.offsets)

    def inner(self, kept: Routed) -> Rows:  # (R, F)
        """Compute activation(gate) up."""
        return Rows(glu(kept.gate_up_ext, self.activation))

    def project_out(self, inner: Rows, seed: Tensor | None, kept: Routed) -> Tensor:  # (M, D)
        """Compute the output of what `inner` returns."""
        routing = kept.routing
        assert routing is not None
        # there are no updates
        kept.h_down = inner.ext.new_empty(0)
        rows = self.down.forward(inner.ext, routing.offsets)
        return combine_expert_rows(rows, routing.places, routing.weights)

    def inner_backward(self, grad_out: Tensor, seed: Tensor | None, kept: Routed) -> None:
        """Turn gate | up into their gradient, and find that of the router's weights.

            grad_weights[m, j] = grad_out[m] . down_e(inner)
                               = down_e'(grad_out[m]) . inner + grad_out[m] . bias_e

        Args:
            grad_out: (M, D), of the output.
        """
        routing = kept.routing
        assert routing is not None
        grad_rows = gather_expert_rows(grad_out, routing.places)
        grad_inner = self.down.backward(grad_rows, routing.offsets)
        del grad_rows
        inner = self.inner(kept).ext
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
        routing = kept.routing
        assert routing is not None
        rows = self.gate_up.backward(kept.gate_up_ext, routing.offsets)
        through_router = route_backward(kept.grad_weights, routing, self.gate.weight)
        return combine_expert_rows(rows, routing.places, start=through_router)

    def accumulate_grad_A(self, y: Tensor, seed: Tensor | None, kept: Routed) -> None:
        """Let go of what was kept: no gradient needs the input."""
        del kept.gate_up_ext, kept.grad_weights
        kept.routing = None
