"""What a run trains from: the SFT checkpoint that it takes up, and the release that DPO goes on from, if any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_assets.artifact import Artifact, ArtifactTree, read_object
from dpo_assets.assets.champion import Champion, find_champion
from dpo_assets.assets.gates import closed_gates
from dpo_assets.assets.lineage import Inputs
from dpo_assets.assets.step import Step
from dpo_assets.checks.evidence.ledger_file import LedgerFile
from dpo_assets.checks.reports import DpoReport
from dpo_assets.errors import ConfigError
from dpo_assets.feedback.dataset import is_whole
from dpo_assets.feedback.trained import training_pairs, write_training_set
from dpo_assets.planning.plan import TrainingPlan, settings_digest
from dpo_assets.planning.refresh import (
    Ancestor,
    ChosenSft,
    ChosenStart,
    EarlierSft,
    Moved,
    Refresh,
    SftData,
    choose_sft,
    choose_start,
    trained_pairs,
)
from dpo_assets.planning.targets import LoraCoverage
from dpo_assets.version import __version__

if TYPE_CHECKING:
    import polars as pl

ADAPTER, CONFIG = "adapter", "adapter_config.json"
SHAPE = ("r", "lora_alpha", "target_modules", "target_parameters", "use_rslora")  # Of an adapter, what must be equal.


def kept(tree: ArtifactTree, kind: str, digest: str) -> Artifact | None:
    """The artefact of that content, verified, or None: also where a batch that a dataset chose from is damaged."""
    told = (told for told in tree.listed(kind) if told.digest == digest)
    found = (made for one in told if (made := tree.find(kind, one.path.name)) is not None)
    return next((made for made in found if is_whole(made.path)), None)


def start_adapter(checkpoint: Artifact) -> Path | None:
    """The SFT adapter, or None when the base was adopted."""
    folder = checkpoint.path / ADAPTER
    return folder if folder.is_dir() else None


def ancestors(tree: ArtifactTree, adapter: Artifact) -> Iterator[Artifact]:
    """An adapter, the one that it went on from, and so on as far as they are in the store."""
    found: Artifact | None = adapter
    while found is not None:
        yield found
        before = found.manifest.inputs.get("dpo_adapter")
        found = kept(tree, "dpo_adapter", before) if before is not None else None


def gone_on_from(tree: ArtifactTree, refresh: Refresh) -> Artifact | None:
    """The adapter of the release that training goes on from; None: it starts from SFT.

    Raises:
        ConfigError: it is not in the store any more.
    """
    if refresh.whole:
        return None
    found = kept(tree, "dpo_adapter", refresh.adapter)
    if found is None:
        raise ConfigError(
            f"the `dpo_adapter` ({refresh.adapter[:12]}) of the release that this run goes on from is gone from "
            f"{tree.root} since the plan was made; materialise `dpo_plan` again."
        )
    return found


def training_set(step: Step, plan: TrainingPlan, inputs: Inputs) -> Artifact:
    """The pairs that DPO trains on where these are not all: what is new since a release, and a draw of the rest.

    Raises:
        ConfigError: the dataset of that release is not in the store any more.
    """
    refresh, dataset = plan.refresh, inputs["dpo_dataset"]

    def make(folder: Path, _: str) -> None:
        then = kept(step.tree, "dpo_dataset", refresh.since)
        if then is None:
            raise ConfigError(
                f"the `dpo_dataset` ({refresh.since[:12]}) of the release that this run goes on from is gone from "
                f"{step.tree.root} since the plan was made; materialise `dpo_plan` again."
            )
        now, before = training_pairs(dataset.path), training_pairs(then.path)
        write_training_set(dataset.path, trained_pairs(now, before, refresh, plan.dpo.seed), folder)

    config = {**refresh.settings(), "seed": plan.dpo.seed}
    return step.build("training_set", config, inputs.only("dpo_dataset"), make)[0]


@dataclass(frozen=True)
class Refreshing:
    """The store of a pipeline, as a plan looks at it.

    Attributes:
        plan: of the run, from SFT on all pairs.
    """

    step: Step
    plan: TrainingPlan
    inputs: Inputs

    def chosen(self) -> tuple[ChosenSft, ChosenStart]:
        """What SFT is trained on, and where DPO starts."""
        rules = self.step.recipe.refresh
        sft = self._sft(rules.renew_sft_after)
        releases = () if rules.policy == "full" else self._releases(sft)
        start = choose_start(
            rules.policy, releases, sft.data, replayed=rules.replay_ratio, most_continued=rules.most_continued
        )
        return sft, start

    @cached_property
    def _now(self) -> pl.Series:
        return training_pairs(self.inputs["dpo_dataset"].path)

    @cached_property
    def _champion(self) -> Champion | None:
        """The release that is live.

        Raises:
            ConfigError: something of it is not in the store, and this run is not the one that would make it again: its
                challenger could not be scored against the champion once it is trained.
        """
        ledger = LedgerFile.of(self.step.tree.root).read()
        if ledger.champion is None:
            return None
        try:
            return find_champion(self.step.tree, ledger.champion)
        except ConfigError:
            decided = ledger.live_decision
            same_data = decided and decided.inputs.get("dpo_dataset") == self.inputs["dpo_dataset"].digest
            if same_data and self.step.recipe.refresh.policy == "full":
                return None
            raise

    def _moved(self, dataset: str) -> Moved | None:
        """How far the pairs moved since a dataset; None where it is not in the store any more."""
        if dataset == self.inputs["dpo_dataset"].digest:
            return Moved(len(self._now), 0, 0)
        then = kept(self.step.tree, "dpo_dataset", dataset)
        return None if then is None else Moved.between(training_pairs(then.path), self._now)

    def _sft(self, limit: float) -> ChosenSft:
        dataset = self.inputs["dpo_dataset"].digest
        if self.plan.sft.strategy == "adopt":
            return ChosenSft(SftData(), None, "SFT: the base is adopted as it is")
        return choose_sft(self._earlier(), dataset, len(self._now), limit)

    def _earlier(self) -> Iterator[EarlierSft]:
        """Checkpoints that this run could have made of other pairs: that of the release that is live, then the newest.

        So challenger and champion are measured against one start where that can be.
        """
        own = [self._champion.start] if self._champion is not None else []
        moved = cache(self._moved)
        for told in chain(own, self.step.tree.listed("sft_checkpoint")):
            inputs, dataset = told.manifest.inputs, told.manifest.inputs.get("dpo_dataset", "")
            same = (
                inputs.get("base_model") == self.inputs["base_model"].digest
                and inputs.get("dpo_plan") == settings_digest(self.plan.sft_part_on(dataset))
                and told.manifest.versions.get("dpo_assets") == __version__
            )
            if same and not closed_gates(told, self.step.recipe.checks.severity) and (found := moved(dataset)):
                yield EarlierSft(told.digest, dataset, found.pairs - found.new + found.gone, found)

    def _releases(self, sft: ChosenSft) -> Iterator[Ancestor]:
        """The release that is live, and those that it went on from."""
        champion = self._champion
        if champion is None:
            return
        refused = self._refused(champion, sft)
        behind = list(ancestors(self.step.tree, champion.adapter))
        if "dpo_adapter" in behind[-1].manifest.inputs:  # How many are behind them all cannot be told.
            refused = refused or "an adapter that the release that is live went on from is not in the store any more"
        for place, adapter in enumerate(behind):
            dataset = adapter.manifest.inputs["dpo_dataset"]
            moved = Moved(0, 0, 0) if refused else self._moved(dataset)
            gone = "" if moved else "the dataset of that release is not in the store any more"
            yield Ancestor(adapter.digest, dataset, len(behind) - place, moved or Moved(0, 0, 0), refused or gone)

    def _refused(self, champion: Champion, sft: ChosenSft) -> str:
        """Why DPO cannot go on from a release; empty: it can."""
        if champion.base.digest != self.inputs["base_model"].digest:
            return "the release that is live was trained on another base"
        own = start_adapter(champion.start)
        if self.plan.sft.strategy == "adopt":
            if own is not None:
                return "the release that is live starts from a trained SFT policy, and this run adopts its base"
            shape: dict[str, object] = {"r": self.plan.lora.rank, "lora_alpha": self.plan.lora.alpha}
        elif champion.start.digest != sft.checkpoint or own is None:
            return f"the release that is live starts from another SFT policy ({sft.why})"
        else:
            shape = _shape(own)
        theirs = _shape(champion.adapter.path / ADAPTER)
        if own is None:
            shape["target modules"], theirs["target modules"] = self.plan.coverage, _covered(champion.adapter)
        if other := [name for name, value in shape.items() if theirs[name] != value]:
            return f"the adapter of the release that is live has another {', '.join(other)}"
        return ""


def _covered(adapter: Artifact) -> LoraCoverage | None:
    """The matrices that it was planned to adapt; None: an earlier version of the package told it otherwise."""
    with suppress(ConfigError):
        return DpoReport.of(adapter).lora_planned
    return None


def _shape(adapter: Path) -> dict[str, object]:
    config = read_object(adapter / CONFIG)
    return {name: sorted(v) if isinstance(v := config.get(name), list) else v or None for name in SHAPE}
