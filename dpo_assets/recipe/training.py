"""SFT, DPO, and the adapter that both train."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dpo_assets.section import Section

FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

EVERY_LINEAR: Literal["all-linear"] = "all-linear"
# The linear layers of the Llama family.
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# What a reference cannot share with the policy once it is trained, and what is scored in fp32 by its own weight.
NOT_IN_LAYERS = frozenset({"lm_head", "embed_tokens", "embed_in", "embed_out", "wte", "wpe"})


class LoraSection(Section):
    """The adapter that SFT and DPO train."""

    rank: int = Field(default=16, ge=1, le=1024, description="Rank r of the LoRA matrices.")
    alpha: int = Field(default=16, ge=1, description="LoRA alpha; the update is scaled by alpha / rank.")
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="LoRA dropout, SFT only: DPO trains without.")
    target_modules: str | list[str] = Field(
        default=EVERY_LINEAR,
        description=(
            "Linear layers that get an adapter: `all-linear`, which is every one of the decoder layers, or names that "
            "the base has there, such as q_proj (Llama) or qkv_proj (Phi-3). Where PEFT takes a name for the experts "
            "(shared experts of DeepSeek and GLM-4 MoE), it stays frozen, and check `lora_coverage` says so."
        ),
        examples=["all-linear", ["q_proj", "v_proj"]],
    )
    target_parameters: list[str] = Field(
        default=[],
        description=(
            "Experts that get an adapter: `experts.gate_up_proj`, `experts.down_proj`. `all-linear` leaves them and "
            "the router frozen."
        ),
    )

    @field_validator("target_modules", mode="before")
    @classmethod
    def _all_or_some(cls, value: Any) -> str | list[str]:
        """One spelling of each choice: `all-linear`, or a list of names."""
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
            raise ValueError("write `all-linear`, or a list of names such as [q_proj, v_proj].")
        names = [part.strip() for part in parts]
        if names == [EVERY_LINEAR]:
            return EVERY_LINEAR
        if not names or not all(names):
            raise ValueError("a layer has no name; write `all-linear`, or a list of names such as [q_proj, v_proj].")
        if EVERY_LINEAR in names:
            raise ValueError("`all-linear` stands alone, or leave it out and name the layers.")
        if outside := [name for name in names if name in NOT_IN_LAYERS]:
            raise ValueError(f"`{outside[0]}` is no layer of the decoder: embeddings and head stay as they are.")
        return _once(names)

    @field_validator("target_parameters")
    @classmethod
    def _parameters_once(cls, value: list[str]) -> list[str]:
        return _once(value)

    @model_validator(mode="after")
    def _experts_without_dropout(self) -> LoraSection:
        if self.target_parameters and self.dropout:
            raise ValueError("`target_parameters` cannot be trained with dropout; set `dropout` to 0.")
        return self


def _once(names: list[str]) -> list[str]:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"`{twice[0]}` stands twice; name it once.")
    return names


class OptimSection(Section):
    """What SFT and DPO have in common. Every value is explicit: no library default is relied on."""

    learning_rate: float = Field(gt=0.0, description="Peak learning rate of AdamW.")
    epochs: float = Field(default=1.0, gt=0.0, description="Passes over the training pairs.")
    batch_size: int = Field(default=16, ge=1, description="Pairs per optimizer step (the effective batch).")
    warmup_ratio: float = Field(
        default=0.1,
        ge=0.0,
        lt=1.0,
        description="Share of the steps, rounded up, whose rate rises to the peak; the first of them moves already.",
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="Learning-rate schedule after the warm-up; every one of them is warmed up."
    )
    weight_decay: float = Field(default=0.0, ge=0.0, description="AdamW weight decay.")
    max_grad_norm: float = Field(default=1.0, gt=0.0, description="Gradient clipping threshold.")
    router_balance: float = Field(
        default=0.0,
        ge=0.0,
        description=(
            "What the balancing loss of routers is multiplied by and added (Switch Transformers, arXiv 2101.03961), as "
            "`router_aux_loss_coef` is; 0.001 to 0.02 are usual in pretraining. For mixtures of experts on kernels "
            "`transformers`. Frozen routers are balanced too, by what the adapter makes of their inputs."
        ),
    )
    seed: int = Field(default=42, ge=0, description="Seed of adapter initialisation and data order.")


class SftSection(OptimSection):
    """Supervised fine-tuning on the chosen answers: the policy DPO starts from, and its reference."""

    strategy: Literal["train", "adopt"] = Field(
        default="train", description="`train` on chosen answers, or `adopt` a base that is already an instruct model."
    )
    learning_rate: float = Field(default=2e-4, gt=0.0, description="Peak learning rate of the SFT adapter.")


class DpoSection(OptimSection):
    """Direct preference optimisation (Rafailov et al., arXiv 2305.18290)."""

    learning_rate: float = Field(
        default=5e-6, gt=0.0, description="Peak learning rate; 5e-6 is TRL's and Unsloth's value for LoRA."
    )
    beta: float = Field(
        default=0.1,
        ge=0.0,
        description="Strength of the pull towards the reference: larger stays closer; its unit depends on the loss.",
    )
    # Any name: the check `loss_supported` decides, so that a wrong one ends in a check that says what to use instead,
    # not in a failed form.
    loss: str | list[str] = Field(
        default="sigmoid",
        description=(
            "DPO loss, or several that are added up: a list, or names with commas between them. `sigmoid` is the "
            "paper's; docs/checks.md lists them all."
        ),
        examples=["sigmoid", ["sigmoid", "sft"]],
    )
    loss_weights: list[float] = Field(
        default=[], description="Weight of each loss, in their order; empty: every loss counts once."
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0.0,
        lt=0.5,
        description="Share of labels taken to be wrong; for cdpo, robust, exo_pair, aot and aot_unpaired.",
    )
    f_divergence: FDivergence = Field(
        default="reverse_kl", description="What the pull towards the reference measures (f-DPO, arXiv 2309.16240)."
    )
    alpha: float = Field(
        default=0.5,
        ge=0.0,
        le=1.0,
        description="Only for f_divergence `alpha_divergence`: 0 is the forward KL, 1 the reverse KL.",
    )
    discopop_tau: float = Field(
        default=0.05, gt=0.0, description="Only for the loss discopop: its temperature; 0.05 is the paper's."
    )
    reference: Literal["sft", "base"] = Field(
        default="sft",
        description=(
            "What the policy is compared with: `sft`, where DPO starts, or `base`. After a trained SFT, `base` is not "
            "the start, and the first-loss check stops the run."
        ),
    )
    reference_strategy: Literal["cached", "adapter", "merged", "model"] = Field(
        default="cached",
        description=(
            "Where reference scores come from. `cached`: scored once per pair and kept; `adapter`: a frozen copy of "
            "the starting adapter, at every step; `merged`: SFT merged into the base, which then is the reference; "
            "`model`: a second model in memory. `trainer: trl` always keeps a frozen adapter."
        ),
    )
    trainer: Literal["packed", "trl"] = Field(
        default="packed", description="`packed`: shared prompts, no padding; `trl`: TRL's own DPOTrainer (needs a GPU)."
    )
    micro_batch_size: int = Field(
        default=0,
        ge=0,
        description=(
            "Pairs of one forward of `trainer: trl`, accumulated to `batch_size`; 0: two, or one where two do not fit. "
            "The packed trainer cuts a step by memory instead."
        ),
    )

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of the losses that are added up."""
        return (self.loss,) if isinstance(self.loss, str) else tuple(self.loss)

    @field_validator("loss", mode="before")
    @classmethod
    def _one_name_or_several(cls, value: Any) -> str | list[str]:
        """One spelling of each choice, so that equal losses are equal recipes: a name alone, or a list of names."""
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
            raise ValueError("a loss is a name, or a list of names such as [sigmoid, sft].")
        names = [part.strip() for part in parts]
        if not names or not all(names):
            raise ValueError("a loss has no name; write one, or a list of names such as [sigmoid, sft].")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"`{twice[0]}` stands twice; name it once and set its weight in `loss_weights`.")
        return names[0] if len(names) == 1 else names

    @model_validator(mode="after")
    def _every_loss_has_a_weight(self) -> DpoSection:
        if self.loss_weights and len(self.loss_weights) != len(self.losses):
            raise ValueError(
                f"`loss_weights` has {len(self.loss_weights)} values for {len(self.losses)} losses "
                f"({', '.join(self.losses)}); give one for each, or none at all."
            )
        if self.trainer == "trl" and self.reference_strategy in ("merged", "model"):
            raise ValueError(
                "`trainer: trl` keeps a frozen adapter as its reference; "
                f"`reference_strategy: {self.reference_strategy}` is for the packed trainer."
            )
        if self.trainer == "packed" and self.micro_batch_size:
            raise ValueError("`micro_batch_size` is for `trainer: trl`; the packed trainer cuts a step by memory.")
        if any(weight <= 0 for weight in self.loss_weights):
            raise ValueError("a weight in `loss_weights` is not above 0; leave that loss out of `loss`.")
        return self
