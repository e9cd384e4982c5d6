"""The sizes of a run's largest micro-batch: what `step/memory_plan.py` and `step/duration.py`
reckon with.

M = B T rows
"""

from dataclasses import dataclass

import torch

from kernels.device import H200, Properties, properties
from llama.attention import torch_attends
from llama.config import LlamaConfig
from llama.model import Llama

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Workload:
    """The model, the batches and the machine that a plan is for.

    Attributes:
        model: on the meta device, as it will lie on the GPU, with its adapter.
        moment_bytes: on the device, of both moments of one number of the adapter.
        batch: rows of the largest micro-batch.
        tokens: of each row, with its padding.
        sample_tokens: the mean length of the sample that a token is in, where rows hold several.
        has_noise: whether NEFTune adds noise to the embeddings.
        has_aux_loss: whether a mixture of experts has the auxiliary loss.
        evaluation: rows and tokens of the largest batch that is evaluated, if one is.
        prompt_tokens: of the longest text that is sampled, answer included; 0 where none is.
        num_shapes: of micro-batches that may be captured as graphs.
        num_evaluated_shapes: of batches that are evaluated, likewise.
        num_ranks: processes that train together, a GPU each.
        device: on which the run takes place.
        planned_gpu: the GPU of a plan that is for another than this machine has.
    """

    model: Llama
    moment_bytes: float
    batch: int
    tokens: int
    sample_tokens: float | None = None
    has_noise: bool = False
    has_aux_loss: bool = False
    evaluation: tuple[int, int] | None = None
    prompt_tokens: int = 0
    num_shapes: int = 1
    num_evaluated_shapes: int = 0
    num_ranks: int = 1
    device: torch.device = CPU
    planned_gpu: Properties | None = None

    @property
    def gpu(self) -> Properties:
        """The facts of the GPU, an H200 where there is none."""
        if self.planned_gpu:
            return self.planned_gpu
        return properties(self.device) if self.device.type == "cuda" else H200

    @property
    def config(self) -> LlamaConfig:
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return self.model.compute_dtype

    @property
    def M(self) -> int:
        return self.batch * self.tokens

    @property
    def is_masked(self) -> bool:
        """Whether attention is `kernels.masked_attention`'s, at least in some layers."""
        is_capped = self.config.attn_logit_softcapping is not None
        is_packed = self.sample_tokens is not None
        is_by_torch = all(
            torch_attends(self.gpu, self.dtype, heads.head_dim)
            for heads in self.config.distinct_heads
        )
        return is_capped or is_packed or not is_by_torch

    @property
    def num_adapted(self) -> int:
        """Numbers of the adapter, with the room that its parameters have for more."""
        return sum(parameter.numel() for parameter in self.model.trainable_parameters())
