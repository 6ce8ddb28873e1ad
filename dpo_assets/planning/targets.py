"""Which matrices get an adapter: the recipe's names against what the base has."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from dpo_assets.errors import ConfigError
from dpo_assets.planning.matrices import Matrices, Role, described_matrices
from dpo_assets.planning.shape import ModelShape
from dpo_assets.recipe import ALL_LINEAR, EVERY_LINEAR, LoraSection

# How the experts of one parameter are stored where they are stored one by one, or under an older name (the weight
# conversions of Transformers 5: Mixtral, Qwen-MoE, DeepSeek, Granite).
STORED_AS: dict[str, frozenset[str]] = {
    "gate_up_proj": frozenset({"gate_up_proj", "gate_proj", "up_proj", "w1", "w3", "input_linear"}),
    "down_proj": frozenset({"down_proj", "w2", "output_linear"}),
}
OLDER_NAMES = frozenset[str]().union(*STORED_AS.values()) - STORED_AS.keys()
EXPERT_PARAMETERS = ("experts.gate_up_proj", "experts.down_proj")
# Of these model types PEFT 0.21 takes three names for the experts' wherever they stand (`_convert_peft_config_moe`, for
# adapters made with Transformers 4): shared experts and dense MLPs of the same names cannot be adapted.
EXPERTS_ALONE = frozenset({"gate_proj", "up_proj", "down_proj"})
EXPERTS_ALONE_IN = frozenset({
    "afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe",
    "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum",
    "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_thinker", "solar_open",
})  # fmt: skip
# Of these PEFT 0.21 refuses an adapter on `out_proj` (`_check_lora_target_modules_mamba`): Mamba's kernels read its
# weight and never call it.
OUTPUT_UNCALLED = frozenset({"out_proj"})
OUTPUT_UNCALLED_IN = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})


class Covered(BaseModel):
    """One kind of matrix, and how many of its weights have an adapter."""

    model_config = ConfigDict(frozen=True)
    name: str
    role: Role
    weights: int
    adapted: int


class LoraCoverage(BaseModel):
    """What of the decoder layers' matrices an adapter changes. Norms, biases, embeddings and head are no part of it."""

    model_config = ConfigDict(frozen=True)
    kinds: tuple[Covered, ...] = ()
    wider_than_layer: tuple[str, ...] = Field(default=(), description="Adapted kinds with a side below the rank.")
    out_of_reach: tuple[str, ...] = Field(default=(), description="Linear kinds that PEFT cannot put an adapter on.")

    @property
    def share(self) -> float:
        """Share of the weights that have an adapter; routers count on neither side, unless they have one."""
        judged = [kind for kind in self.kinds if kind.role != "router" or kind.adapted]
        return sum(kind.adapted for kind in judged) / max(1, sum(kind.weights for kind in judged))

    @property
    def frozen(self) -> tuple[str, ...]:
        """Kinds of which a part stays as it is. A router does by default, and by intent."""
        return tuple(kind.name for kind in self.kinds if kind.adapted < kind.weights and kind.role != "router")

    @property
    def frozen_experts(self) -> bool:
        return any(kind.role == "experts" and kind.adapted < kind.weights for kind in self.kinds)


def resolve_targets(lora: LoraSection, shape: ModelShape) -> LoraSection:
    """The section with `all-linear` spelled out, its names known to be the base's.

    A shape that no files and no description tell of is left as it is: the worker, which has the model, resolves it by
    the same rules.

    Raises:
        ConfigError: for a name that matches nothing, with what there is; for a base without linear layers; for expert
            parameters of a base that has no experts; for layers that PEFT takes for experts.
    """
    kinds = kinds_of(shape)
    if kinds is None:
        return lora
    linear = [kind for kind in kinds if kind.role == "linear"]
    who = shape.architecture or "this base"
    if not linear:
        raise ConfigError(f"{who} has no linear layers that an adapter could be put on; take a decoder language model.")
    every = lora.target_modules == EVERY_LINEAR
    names = all_linear(linear, shape.model_type) if every else list(lora.target_modules)
    refuse_unknown(names, lora.target_parameters, kinds, who)
    lost = [kind for kind in linear if out_of_reach(kind, shape.model_type)]
    if taken := [name for name in names if any(kind.answers_to(name) for kind in lost)]:
        raise ConfigError(
            f"lora.target_modules: {_why_out_of_reach(taken, shape.model_type)}. Leave it out, or write "
            f"`{EVERY_LINEAR}`.{_experts_hint(kinds)}"
        )
    return lora.model_copy(update={"target_modules": names})


def kinds_of(shape: ModelShape) -> tuple[Matrices, ...] | None:
    """The matrices of a model: its files', or its description's; None where it has none and is not described whole."""
    if shape.matrices is not None:
        return shape.matrices
    return None if shape.decoder is None or shape.decoder.beyond else described_matrices(shape.decoder)


def out_of_reach(kind: Matrices, model_type: str) -> bool:
    """Whether PEFT takes a linear kind of this name for experts, or refuses it."""
    experts = model_type in EXPERTS_ALONE_IN and kind.last in EXPERTS_ALONE
    return kind.role == "linear" and (experts or (model_type in OUTPUT_UNCALLED_IN and kind.last in OUTPUT_UNCALLED))


def _why_out_of_reach(names: Sequence[str], model_type: str) -> str:
    if model_type in OUTPUT_UNCALLED_IN:
        return f"PEFT puts no adapter on {_listed(names)} of a {model_type}, whose kernels would pass it by"
    return f"PEFT takes {_listed(names)} for the experts of a {model_type}, and would adapt these instead"


def all_linear(kinds: Sequence[Matrices], model_type: str) -> list[str]:
    """The last parts of the names of all linear kinds: Llama's seven in their usual order, then the others."""
    last = {kind.last for kind in kinds if kind.role == "linear" and not out_of_reach(kind, model_type)}
    return [name for name in ALL_LINEAR if name in last] + sorted(last - set(ALL_LINEAR))


def refuse_unknown(
    names: Sequence[str], parameters: Sequence[str], kinds: Sequence[Matrices], who: str, *, exact: bool = False
) -> None:
    """Refuses names that match no matrix.

    Args:
        exact: whether the kinds are the loaded model's. In files, experts may be named otherwise than in the model.

    Raises:
        ConfigError: with the names, and with what the base has.
    """
    modules = [kind for kind in kinds if kind.role != "experts"]
    if unknown := [name for name in names if not any(kind.answers_to(name) for kind in modules)]:
        has = ", ".join(kind.name for kind in modules)
        raise ConfigError(
            f"lora.target_modules: {_listed(unknown)} matches nothing in the decoder layers of {who}, which have: "
            f"{has}. Name some of these, or write `{EVERY_LINEAR}`.{_experts_hint(kinds)}"
        )
    experts = [kind for kind in kinds if kind.role == "experts"]
    meant = Matrices.answers_to if exact else _stored_for
    if unknown := [name for name in parameters if not any(meant(kind, name) for kind in experts)]:
        has = f"has: {', '.join(_expert_names(experts, exact=exact))}" if experts else "has no experts; leave it out"
        raise ConfigError(f"lora.target_parameters: {_listed(unknown)} matches nothing in {who}, which {has}.")


def covers(parameter: str, kind: Matrices) -> bool:
    """Whether an entry of `target_parameters` means these experts, as they are stored."""
    return kind.role == "experts" and _stored_for(kind, parameter)


def _stored_for(kind: Matrices, parameter: str) -> bool:
    """Whether stored experts are those of a parameter: by its own name, where the loaded model has them under it."""
    before, _, last = parameter.rpartition(".")
    if before.rpartition(".")[2] in ("", "experts") and kind.last in STORED_AS.get(last, ()):
        return True
    return kind.answers_to(parameter) and kind.last not in OLDER_NAMES


def adapted_kinds(lora: LoraSection, shape: ModelShape) -> tuple[Matrices, ...]:
    """The kinds that a resolved section puts an adapter on; none where the shape does not tell."""
    return tuple(kind for kind in kinds_of(shape) or () if is_adapted(lora, kind))


def is_adapted(lora: LoraSection, kind: Matrices) -> bool:
    """Whether a section puts an adapter on a kind."""
    if kind.role == "experts":
        return any(covers(name, kind) for name in lora.target_parameters)
    if lora.target_modules == EVERY_LINEAR:
        return kind.role == "linear"
    return any(kind.answers_to(name) for name in lora.target_modules)


def planned_coverage(lora: LoraSection, shape: ModelShape) -> LoraCoverage:
    """What a resolved section will cover."""
    kinds = kinds_of(shape) or ()
    chosen = {kind.name for kind in kinds if is_adapted(lora, kind)}
    return LoraCoverage(
        kinds=tuple(
            Covered(name=k.name, role=k.role, weights=k.weights, adapted=k.weights if k.name in chosen else 0)
            for k in kinds
        ),
        wider_than_layer=tuple(k.name for k in kinds if k.name in chosen and lora.rank > k.smallest_side),
        out_of_reach=tuple(kind.name for kind in kinds if out_of_reach(kind, shape.model_type)),
    )


def _expert_names(kinds: Sequence[Matrices], *, exact: bool) -> list[str]:
    """Names of experts as the model has them; in its files they may stand under others."""
    names = [kind.name for kind in kinds]
    return names if exact else [*(name for name in EXPERT_PARAMETERS if any(covers(name, k) for k in kinds))] or names


def _experts_hint(kinds: Sequence[Matrices]) -> str:
    if not any(kind.role == "experts" for kind in kinds):
        return ""
    return f" Its experts are adapted by lora.target_parameters, as in [{', '.join(EXPERT_PARAMETERS)}]."


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
