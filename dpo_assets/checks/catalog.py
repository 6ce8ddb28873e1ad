"""Every check by name: which asset it stands on, what it sees, whether it blocks. One row each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dpo_assets.errors import ConfigError
from dpo_assets.recipe import Severity

VITAL = frozenset(
    {
        "safetensors_only", "every_row_accounted_for", "every_pair_accounted_for", "schema", "split_leak",
        "loss_supported", "sft_finite", "reference_is_start", "finite", "all_finite", "held_out_unseen",
        "release_verified", "tensors_kept",
    }
)  # fmt: skip


@dataclass(frozen=True)
class CheckInfo:
    """A check as the UI lists it before anything ran.

    `blocking` is its severity where a recipe sets none. A VITAL check cannot be lowered: what fails it is no model, or
    no account of what was done.
    """

    name: str
    asset: str
    description: str
    blocking: bool = True

    @property
    def severity(self) -> Severity:
        return "error" if self.blocking else "warn"


CHECKS: tuple[CheckInfo, ...] = (
    CheckInfo("revision_pinned", "base_model", "A Hub model is named by a commit sha, so that it cannot change."),
    CheckInfo("safetensors_only", "base_model", "Weights are safetensors; pickled weights can run code when loaded."),
    CheckInfo("licence_known", "base_model", "The base model states a licence that a release can carry on."),
    CheckInfo("every_file_read", "raw_preferences", "Every file of the sources was read, in a format that it has."),
    CheckInfo(
        "every_row_accounted_for", "raw_preferences", "Files found are read; rows seen lie in tables, file by file."
    ),
    CheckInfo("feedback_volume", "raw_preferences", "No source lost rows since the last time.", blocking=False),
    CheckInfo(
        "judged_text_kept",
        "raw_preferences",
        "Judged text is kept whole, and is the assistant's alone.",
        blocking=False,
    ),
    CheckInfo("every_pair_accounted_for", "dpo_dataset", "Rows in = accepted + quarantined + duplicates."),
    CheckInfo("schema", "dpo_dataset", "Every accepted pair satisfies the pandera schema."),
    CheckInfo("split_leak", "dpo_dataset", "No prompt stands in both train and eval."),
    CheckInfo("distinct_after_truncation", "dpo_dataset", "No accepted pair is equal once cut to max_length."),
    CheckInfo("quarantine_rate", "dpo_dataset", "The share of damaged rows stays below the recipe's limit."),
    CheckInfo("enough_pairs", "dpo_dataset", "There are enough training pairs, and held-out pairs to judge by."),
    CheckInfo("answers_truncated", "dpo_dataset", "Answers end within max_length, with their EOS.", blocking=False),
    CheckInfo("pair_distance", "dpo_dataset", "Chosen and rejected answers differ enough for DPO to tell them apart."),
    CheckInfo("length_bias", "dpo_dataset", "Chosen answers are not preferred for their length.", blocking=False),
    CheckInfo("label_conflicts", "dpo_dataset", "Preferences on the same prompt do not contradict each other."),
    CheckInfo("degenerate_chosen", "dpo_dataset", "Chosen answers say something, end, and do not repeat themselves."),
    CheckInfo("too_easy", "dpo_dataset", "Form alone does not tell chosen from rejected answers.", blocking=False),
    CheckInfo("feedback_drift", "dpo_dataset", "The newest feedback is like the feedback before it.", blocking=False),
    CheckInfo("learning_rate_band", "dpo_plan", "The DPO learning rate lies where published runs survived."),
    CheckInfo("training_dose", "dpo_plan", "Learning rate, epochs and batch do not add up to too much for each pair."),
    CheckInfo("dpo_rate_against_sft", "dpo_plan", "The DPO learning rate is not copied from SFT."),
    CheckInfo("beta_for_loss", "dpo_plan", "Beta suits the loss: its unit differs from loss to loss."),
    CheckInfo("loss_supported", "dpo_plan", "The loss exists here, and uses the label smoothing it is given."),
    CheckInfo("budget", "dpo_plan", "There are enough steps to judge a run by.", blocking=False),
    CheckInfo("schedule_and_precision", "dpo_plan", "Warm-up, clipping and number format.", blocking=False),
    CheckInfo("lora_scale", "dpo_plan", "The adapter's scale and rank suit the learning rate.", blocking=False),
    CheckInfo("lora_coverage", "dpo_plan", "Every matrix of the decoder layers gets an adapter.", blocking=False),
    CheckInfo("memory_fits", "dpo_plan", "The estimated peak fits the device."),
    CheckInfo("refresh_policy", "dpo_plan", "DPO does not go on from releases with new pairs alone.", blocking=False),
    CheckInfo("sft_finite", "sft_checkpoint", "Every logged value of the SFT run is finite."),
    CheckInfo("sft_learned", "sft_checkpoint", "The loss on held-out chosen answers fell.", blocking=False),
    CheckInfo("eos_kept", "sft_checkpoint", "Training answers end with the end-of-turn token, so the model can stop."),
    CheckInfo(
        "reference_is_start", "dpo_adapter", "The first loss is the loss at zero margin: the reference is the start."
    ),
    CheckInfo("finite", "dpo_adapter", "Every logged value of the DPO run is finite."),
    CheckInfo("adapter_attached", "dpo_adapter", "The trained adapter covers of the layers what the plan says."),
    CheckInfo("engine_as_planned", "dpo_adapter", "The engine that the plan names computed the run.", blocking=False),
    CheckInfo("displacement", "dpo_adapter", "Chosen answers did not lose their likelihood.", blocking=False),
    CheckInfo("collapse", "dpo_adapter", "No rule of the collapse guard fired while DPO ran."),
    CheckInfo(
        "learned", "dpo_adapter", "Held-out pairs are ranked better than by chance, and not the wrong way round."
    ),
    CheckInfo("kl_budget", "dpo_adapter", "The policy's own answers stay near the reference (KL per token)."),
    CheckInfo("generation_health", "dpo_adapter", "Sampled answers still end, and do not repeat themselves."),
    CheckInfo("capability_retention", "dpo_adapter", "What the reference could do, the policy still can."),
    CheckInfo("adapter_norm", "dpo_adapter", "The adapter changes no layer out of proportion.", blocking=False),
    CheckInfo("fidelity", "merged_model", "The merged model scores pairs as base + adapter did."),
    CheckInfo("all_finite", "merged_model", "Every merged weight is finite."),
    CheckInfo(
        "tensors_kept", "merged_model", "Every tensor of the base is released, byte for byte unless it has an adapter."
    ),
    CheckInfo("held_out_unseen", "eval_scores", "No pair is scored whose opening message the model was trained on."),
    CheckInfo(
        "kept_by_merge", "eval_scores", "What the adapter learned is left in the merged weights.", blocking=False
    ),
    CheckInfo("greedy_health", "eval_scores", "The release's greedy answers end, and do not repeat.", blocking=False),
    CheckInfo("released_kl", "eval_scores", "The release's own answers stay near SFT (KL per token)."),
    CheckInfo("neutral_perplexity", "eval_scores", "Texts that no feedback is about stayed as likely as before."),
    CheckInfo("champion_scored", "eval_scores", "The champion was asked every held-out pair.", blocking=False),
    CheckInfo(
        "instructions_followed",
        "eval_scores",
        "The policy follows instructions about form as SFT does.",
        blocking=False,
    ),
    CheckInfo(
        "judge_health", "judged_answers", "The judge answers, agrees with itself and with people.", blocking=False
    ),
    CheckInfo("judged_better", "judged_answers", "The judge does not prefer the answers of SFT.", blocking=False),
    CheckInfo("gguf_loads", "gguf_model", "The file read back is the merged model, its tokens and template included."),
    CheckInfo(
        "reward_model_health",
        "reward_model_scores",
        "The reward model scores what it is given, and agrees with people.",
        blocking=False,
    ),
    CheckInfo(
        "rewarded_better", "reward_model_scores", "The reward model does not prefer the answers of SFT.", blocking=False
    ),
    CheckInfo("benchmark_whole", "benchmark_scores", "Every row of every benchmark was scored.", blocking=False),
    CheckInfo("benchmark_unseen", "benchmark_scores", "No row asks what the model was trained on.", blocking=False),
    CheckInfo(
        "harness_retained", "harness_scores", "No task is answered worse than by SFT, beyond chance.", blocking=False
    ),
    CheckInfo(
        "promotion_verdict", "promotion", "The policy beats what is live, or its start, beyond chance; it lost nothing."
    ),
    CheckInfo("release_verified", "published_model", "The release is complete, free of secrets, and reads back equal."),
)


CHECK_BY_NAME: dict[str, CheckInfo] = {check.name: check for check in CHECKS}


def severity_of(check: str, chosen: Mapping[str, Severity]) -> Severity:
    """What counts for a check: the recipe's severity, or its own."""
    return chosen.get(check, CHECK_BY_NAME[check].severity)


def validate_severities(chosen: Mapping[str, Severity]) -> None:
    """Refuses names that are no check, and a vital check that would only warn.

    Raises:
        ConfigError: with the names that exist.
    """
    for name, severity in chosen.items():
        if name not in CHECK_BY_NAME:
            raise ConfigError(f"checks.severity: there is no check `{name}`; there are: {', '.join(CHECK_BY_NAME)}")
        if severity == "warn" and name in VITAL:
            raise ConfigError(
                f"checks.severity.{name}: this check cannot be lowered to `warn`: {CHECK_BY_NAME[name].description}"
            )


def checks_of(asset: str) -> tuple[CheckInfo, ...]:
    """The checks that stand on an asset, in order."""
    return tuple(check for check in CHECKS if check.asset == asset)
