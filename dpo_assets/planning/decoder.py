"""What a decoder computes, layer by layer: the one description that the planner, the engines and the support page read.

A decoder is described from its config.json, without its weights and without torch. An engine serves what it can compute
of a description and names what it cannot; no engine asks for the name of a family. Families are rows of `families.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu2", "clamped_silu"]


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of queries and keys (Su et al., arXiv 2104.09864).

    Attributes:
        dim: leading columns of a head that are rotated; the rest passes.
        pairs: `halves` rotates column i with i + dim / 2 (Llama), `neighbours` 2 i with 2 i + 1 (GLM, Ernie).
        table: key of the decoder's rotary tables that this layer uses; empty where there is only one.
    """

    dim: int
    pairs: Literal["halves", "neighbours"] = "halves"
    table: str = ""


@dataclass(frozen=True)
class QkNorm:
    """RMS norms of queries and keys: over each head, or over a whole projection; before rotation or after it."""

    over: Literal["head", "projection"] = "head"
    after_rotation: bool = False
    names: tuple[str, str] = ("q_norm", "k_norm")


@dataclass(frozen=True)
class QueryGrowth:
    """Queries times 1 + beta log(1 + floor(position / length)) (Ministral 3)."""

    beta: float
    length: int


@dataclass(frozen=True)
class Attention:
    """Softmax attention of grouped heads.

    Attributes:
        scale: what scores are multiplied by.
        window: tokens that a query sees, itself included; None: all before it.
        projections: names of the modules that make q, k and v: three, or one that makes all (rows of q, k, v in order).
        softcap: scores become cap tanh(score / cap); None: as they are.
        sinks: a learnt score per head that takes part in the softmax and has no value (gpt-oss).
        gated: q_proj makes for each head its query and then a gate; the output is times sigmoid(gate) (Qwen3.5).
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None
    window: int | None = None
    module: str = "self_attn"
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    output: str = "o_proj"
    qk_norm: QkNorm | None = None
    query_growth: QueryGrowth | None = None
    softcap: float | None = None
    sinks: bool = False
    gated: bool = False

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Recurrent:
    """A mixer that carries a state along the row, so that what stands before a row must never reach it.

    Attributes:
        inner: width of its state's values, for memory and arithmetic.
        linears: (name, output, input) of its linear layers.
    """

    kind: Literal["delta_net", "short_conv", "mamba"]
    module: str
    inner: int
    linears: tuple[tuple[str, int, int], ...] = ()
    heads: int = 0
    head_dim: int = 0


@dataclass(frozen=True)
class Mlp:
    """act(gate) * up, then down. `projections`: gate and up, or one module that makes both (gate's rows first)."""

    width: int
    activation: Activation = "silu"
    module: str = "mlp"
    projections: tuple[str, ...] = ("gate_proj", "up_proj")
    output: str = "down_proj"


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: a router chooses `active` of `count` a token; `shared`: width of one for all tokens."""

    count: int
    active: int
    width: int
    shared: int = 0
    module: str = "mlp"
    activation: Activation = "silu"


@dataclass(frozen=True)
class Norms:
    """Names of a layer's RMS norms, empty where there is none: before and after the mixer, before and after the MLP."""

    before_mixer: str = "input_layernorm"
    after_mixer: str = ""
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str = ""


@dataclass(frozen=True)
class Layer:
    """x + r norm(mixer(norm(x))), then + r norm(mlp(norm(.))), where r is the decoder's `residual_scale`."""

    mixer: Attention | Recurrent
    mlp: Mlp | Experts
    norms: Norms = Norms()


@dataclass(frozen=True)
class Decoder:
    """A decoder of a causal language model.

    Attributes:
        family: `model_type` of its text config.
        norm_offset: what is added to the weights of its RMS norms (1 where they are kept around zero: Gemma, Qwen3.5).
        embedding_scale: what embeddings are multiplied by.
        beyond: what it computes that this description has no words for; only its own forward is exact then.
    """

    family: str
    hidden: int
    vocabulary: int
    layers: tuple[Layer, ...]
    eps: float
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    tied: bool = False
    beyond: str = ""

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """The attention layers' descriptions, in order."""
        return tuple(layer.mixer for layer in self.layers if isinstance(layer.mixer, Attention))

    @property
    def windows(self) -> tuple[int, ...]:
        """The distinct windows of its layers, shortest first."""
        return tuple(sorted({a.window for a in self.attentions if a.window is not None}))
