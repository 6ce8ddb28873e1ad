"""What a decoder computes, layer by layer: the one description that the planner, the engines and the support page read.

A decoder is described from its config.json, without its weights and without torch. An engine serves what it can compute
of a description and names what it cannot; no engine asks for the name of a family. Families are rows of `families.py`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu2", "clamped_silu"]
Linear = tuple[str, int, int]  # A linear layer: its name in the decoder layer, output width, input width.


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of queries and keys (Su et al., arXiv 2104.09864).

    Attributes:
        dim: leading columns of a head that are rotated; the rest passes.
        pairs: `halves` rotates column i with i + dim / 2 (Llama), `neighbours` 2 i with 2 i + 1 (GLM, Ernie).
        table: key of the decoder's rotary tables that this layer uses; empty where there is only one.
        axes: positions that the tables take for a token: 3 where images have height and width (Qwen3.5). Text repeats
            its own.
        fixed_up_to: tokens of a row up to which the tables stay what they are. Beyond, the longest row of a batch
            changes those of all its rows (longrope, dynamic NTK); None: they never change.
    """

    dim: int
    pairs: Literal["halves", "neighbours"] = "halves"
    table: str = ""
    axes: int = 1
    fixed_up_to: int | None = None


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

    def linears(self, hidden: int) -> tuple[Linear, ...]:
        """Its linear layers, in the order of computation."""
        queries = self.query_width * (2 if self.gated else 1)
        widths = [queries, self.kv_width, self.kv_width]
        made = zip(self.projections, widths if len(self.projections) == 3 else [sum(widths)], strict=True)
        return (
            *((f"{self.module}.{name}", width, hidden) for name, width in made),
            (f"{self.module}.{self.output}", hidden, self.query_width),
        )


@dataclass(frozen=True)
class Recurrent:
    """A mixer that carries a state along the row, so that what stands before a row must never reach it.

    Attributes:
        inner: width of its state's values, for memory and arithmetic.
        projections: its linear layers, named within its module.
        state: values of the state for each value of `inner` (Mamba).
        chunk: tokens that PyTorch's form of Mamba-2 computes against one another.
    """

    kind: Literal["delta_net", "short_conv", "mamba"]
    module: str
    inner: int
    projections: tuple[Linear, ...] = ()
    heads: int = 0
    head_dim: int = 0
    state: int = 0
    chunk: int = 0

    def linears(self, hidden: int) -> tuple[Linear, ...]:
        """Its linear layers, in the order of computation."""
        return tuple((f"{self.module}.{name}", rows, columns) for name, rows, columns in self.projections)


@dataclass(frozen=True)
class Mlp:
    """act(gate) * up, then down. `projections`: gate and up, or one module that makes both (gate's rows first).

    Not `gated` is down(act(up)), where up is the one projection.
    """

    width: int
    activation: Activation = "silu"
    module: str = "mlp"
    projections: tuple[str, ...] = ("gate_proj", "up_proj")
    output: str = "down_proj"
    gated: bool = True

    def linears(self, hidden: int) -> tuple[Linear, ...]:
        """Its linear layers, in the order of computation."""
        made = (2 if self.gated else 1) * self.width // len(self.projections)
        return (
            *((f"{self.module}.{name}", made, hidden) for name in self.projections),
            (f"{self.module}.{self.output}", hidden, self.width),
        )


@dataclass(frozen=True)
class Experts:
    """A mixture of gated experts: a router chooses `active` of `count` a token; `shared`: width of one for all tokens.

    The experts are parameters of three dimensions (`experts.gate_up_proj`, `experts.down_proj`), the router is one of
    two; neither is a linear layer. The shared expert is an MLP of linear layers.
    """

    count: int
    active: int
    width: int
    shared: int = 0
    module: str = "mlp"
    activation: Activation = "silu"
    router: str = "gate"
    shared_module: str = "shared_expert"

    def linears(self, hidden: int) -> tuple[Linear, ...]:
        """The linear layers of the shared expert, where there is one."""
        return Mlp(self.shared, module=f"{self.module}.{self.shared_module}").linears(hidden) if self.shared else ()


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
    beside: Recurrent | None = None  # A second mixer of the same input, whose output is added (Falcon-H1).

    @property
    def recurrents(self) -> tuple[Recurrent, ...]:
        """Its mixers that carry a state."""
        return tuple(mixer for mixer in (self.mixer, self.beside) if isinstance(mixer, Recurrent))

    def linears(self, hidden: int) -> tuple[Linear, ...]:
        """Its linear layers, those of routed experts and routers left out."""
        beside = self.beside.linears(hidden) if self.beside else ()
        return self.mixer.linears(hidden) + beside + self.mlp.linears(hidden)


@dataclass(frozen=True)
class Decoder:
    """A decoder of a causal language model.

    Attributes:
        family: `model_type` of its text config.
        norm_offset: what is added to the weights of its RMS norms (1 where they are kept around zero: Gemma, Qwen3.5).
        embedding_scale: what embeddings are multiplied by, rounded to what they are stored in.
        last_norm: name of the norm behind the layers.
        logit_scale, logit_softcap: logits become cap tanh(scale * logit / cap); without a cap, scale * logit.
        beyond: what it computes that this description has no words for; only its own layers are exact then.
        row_by_row: what its layers take from a token's place in a row otherwise than by positions and attention; only
            its own forward on rows is exact then.
    """

    family: str
    hidden: int
    vocabulary: int
    layers: tuple[Layer, ...]
    eps: float
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    last_norm: str = "norm"
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    tied: bool = False
    beyond: str = ""
    row_by_row: str = ""

    @cached_property
    def kinds(self) -> tuple[tuple[Layer, int], ...]:
        """The distinct layers and how many there are of each, in the order of the first of each. Kept: a memory
        estimate asks for every size of a forward."""
        return tuple(Counter(self.layers).items())

    @property
    def mixers(self) -> tuple[Attention | Recurrent, ...]:
        """The distinct mixers of its layers, in the order of the first layer that has each."""
        every = chain.from_iterable((layer.mixer, layer.beside) for layer in self.layers)
        return tuple(dict.fromkeys(mixer for mixer in every if mixer is not None))

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """The attention layers' descriptions, in order."""
        return tuple(layer.mixer for layer in self.layers if isinstance(layer.mixer, Attention))

    @property
    def windows(self) -> tuple[int, ...]:
        """The distinct windows of its layers, shortest first."""
        return tuple(sorted({a.window for a in self.attentions if a.window is not None}))
