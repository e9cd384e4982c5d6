"""What tells one model family from another: the fields in which it differs from Llama."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kernels.glu import Activation
from llama.layer_experts import LayerExperts
from llama.layer_heads import LayerHeads
from llama.layer_ropes import LayerRopes
from llama.layer_windows import LayerWindows

# what the activations of the gates are called in config.json
ACTIVATION_NAMES: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class LayerNorms(NamedTuple):
    """Where a layer normalizes, by what the checkpoint calls each norm; None: nowhere there.

    A norm behind a half of the layer comes before its result is added to the residual stream.
    """

    before_attention: str | None = "input_layernorm"
    behind_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    behind_mlp: str | None = None


LLAMA_NORMS = LayerNorms()


@dataclass(frozen=True)
class Family:
    """How a family reads its config.json.

    Attributes:
        qkv_bias, o_bias, mlp_bias: whether the projections have one, or what the field of
            config.json is called that says so; of experts, their router too.
        qk_norm: whether queries and keys are normalized, each head by itself.
        has_joint_qk_norm: whether all heads of a token are normalized together instead.
        has_value_norm: whether values are, without a weight, each head by itself.
        is_fused: the checkpoint has q, k and v as one tensor, qkv_proj, and gate and up as another,
            gate_up_proj: one member of a linear group, with one update, where others have several.
        is_mlp_fused: that holds for gate and up alone.
        head_dim: where the file gives none; None for hidden_size / num_attention_heads.
        heads: which layers have which heads, as `read_heads` takes it.
        windows: which layers see how many tokens, as `read_windows` takes it.
        rope_types: what the family's files call a scaling of rotary positions, and its name here.
        rotary_share: of a head's dimensions, which turn, where `partial_rotary_factor` does not
            say; None: all, and the family does not read that field.
        scales_queries: whether queries grow with their positions, as `llama_4_scaling_beta` says.
        is_interleaved: rotary positions turn dimensions 2 i and 2 i + 1 together, not the halves.
        ropes: which layers have which rotary positions, as `read_ropes` takes it.
        experts: how config.json describes those of the layers, if they have any.
        has_sinks: whether each head has a score beside those of the tokens.
        activation_field: what names the activation of the gates.
        activation_names: what the file may call it.
        norm_offset: added to the stored weights of all norms.
        has_centred_norms: whether all norms subtract the mean first.
        is_parallel: whether the MLP has attention's input, and not its result added to that.
        scales_embeddings: whether embeddings are multiplied by the root of hidden_size.
        has_layer_scalar: whether what leaves a layer is multiplied by a number of its own.
        constants: fields of config.json that have one value here.
        lacks: fields of config.json that ask for what no model here has, and what that is.
        harmless: values of fields that ask for another function in other families.
        defaults: for fields missing in the file, where they differ from Llama's; null in the file
            stays null.
        rope_default: the rotary positions' parameters where the file gives none.
        fields: of config.json that this family has beside Llama's.
        aliases: what the family's first config.json called fields, and what they are called here.
        file_names: parts of tensors' names in checkpoints, and what they are called here; $ is the
            end of a name.
        transformers_class: the architecture that transformers writes, where it computes the family
            by another one's class.
    """

    model_type: str
    qkv_bias: bool | str = "attention_bias"
    o_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = False
    qk_norm: bool = False
    has_joint_qk_norm: bool = False
    has_value_norm: bool = False
    is_fused: bool = False
    is_mlp_fused: bool = False
    head_dim: int | None = None
    heads: LayerHeads = "alike"
    windows: LayerWindows = "none"
    rotary_share: float | None = None
    rope_types: Mapping[str, str] = field(default_factory=dict)
    scales_queries: bool = False
    is_interleaved: bool = False
    ropes: LayerRopes = "alike"
    experts: LayerExperts | None = None
    has_sinks: bool = False
    activation_field: str = "hidden_act"
    activation_names: Mapping[str, Activation] = field(default_factory=lambda: ACTIVATION_NAMES)
    norms: LayerNorms = LLAMA_NORMS
    norm_offset: float = 0.0
    has_centred_norms: bool = False
    is_parallel: bool = False
    scales_embeddings: bool = False
    has_layer_scalar: bool = False
    constants: Mapping[str, float] = field(default_factory=dict)
    lacks: Mapping[str, str] = field(default_factory=dict)
    harmless: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    rope_default: Mapping[str, Any] = field(default_factory=dict)
    fields: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)
    file_names: Mapping[str, str] = field(default_factory=dict)
    transformers_class: str | None = None
