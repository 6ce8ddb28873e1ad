"""Whether a release that others download answers as the pipeline did before it was sent, in environments without us.

    python -m benchmarks.redownload                                     # makes both environments, some minutes
    python -m benchmarks.redownload --python /one/bin/python --python /other/bin/python

Real pipelines of a 260k-parameter model train, decide and publish through the real client into a Hub in this process.
Each environment then downloads the releases by repository id at the tag `champion`, with a cache of its own that lives
through all of them: a first release, the one that follows it, the first again after a rollback, with a commit of a
colleague on main, and the release of an adapter. Asked are the rendered template, its ids, greedy tokens, and fixed
answers' ids and log-probabilities. What the pipeline says is what its own engine says, before anything is sent.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"  # The Hub in this process does not speak it.

import dagster as dg
import polars as pl
import transformers
from huggingface_hub import HfApi

from benchmarks import redownload_other
from dpo_assets import build_dpo_defs
from dpo_assets.artifact import open_artifact
from dpo_assets.assets.dpo_plan import read_plan
from dpo_assets.contract import TemplateSettings
from dpo_assets.planning.plan import TrainingPlan
from dpo_assets.publishing.commit import CHAMPION
from dpo_assets.publishing.loading import QUESTION
from dpo_assets.training.batches.packing import Group
from dpo_assets.training.evaluation.subjects import Bench, Reading, Subject
from dpo_assets.training.models.chat_format import load_chat_format
from dpo_assets.training.resuming.parts import Parts
from dpo_assets.training.stages.tokenize import PairTokenizer
from dpo_assets_tests.hub_server import HubServer
from dpo_assets_tests.pipelines import failures, materialize, metadata, short_recipe

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
EARLIER = "4.57.6"
WEIGHTS = "model.safetensors"
BASE_FOLDER = Path(str(files("dpo_assets") / "data" / "stories260k"))
BASE, MERGED, ADAPTER = "org/stories260k", "org/bot", "org/bot-adapter"
TRAINED = (
    "base_model", "raw_preferences", "quarantined_preferences", "dpo_dataset", "dpo_plan", "sft_checkpoint",
    "dpo_adapter", "merged_model", "eval_scores",
)  # fmt: skip
DECIDED = ("promotion", "published_model")
TOKENS = 64  # As many as the lines of the card ask for.
EXACT = 1e-4  # Nats a token, fp32 on both sides.
AUTO, AUTO_PEFT, ON_BASE = redownload_other.WAYS
WHY = "shown to be downloaded, whatever it is worth"


@dataclass(frozen=True)
class Question:
    """A conversation whose next turn is the assistant's, and two answers that are scored behind it."""

    messages: tuple[dict[str, str], ...]
    answers: tuple[str, str]


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


QUESTIONS = (
    Question((_user(QUESTION),), ("The sky is blue. It was a sunny day.", "Lily did not know.")),
    Question(
        ({"role": "system", "content": "Tell stories."}, _user("Who is Tom?")),
        ("Tom is a boy.", "A dog, a cat!"),
    ),
    Question(
        (_user("Hello!"), {"role": "assistant", "content": "Hi, friend."}, _user("  What now?\n\nSay it.")),
        ("Let us play in the park.", "No.  1,000 caf\u00e9s \u65e5\u672c"),
    ),
)


@dataclass(frozen=True)
class Said:
    """What a model says to one question.

    `answer` is greedy, up to the id that ends it, `spoken` its text. `logps` are summed over `answer_ids`, in nats.
    """

    text: str
    ids: list[int]
    answer: list[int]
    spoken: str
    answer_ids: list[list[int]]
    logps: list[float]

    def differs(self, other: Said) -> list[str]:
        """What is not the same, log-probabilities aside."""
        names = ("text", "ids", "answer", "spoken", "answer_ids")
        return [name for name in names if getattr(self, name) != getattr(other, name)]

    def gap(self, other: Said) -> float:
        """The largest difference of a fixed answer's log-probability, nats a token."""
        pairs = zip(self.logps, other.logps, self.answer_ids, strict=True)
        return max(abs(one - two) / len(ids) for one, two, ids in pairs)


def differences(said: Sequence[Said], other: Sequence[Said]) -> list[str]:
    """What two models do not say alike."""
    return sorted({name for one, two in zip(said, other, strict=True) for name in one.differs(two)})


def largest_gap(said: Sequence[Said], other: Sequence[Said]) -> float:
    """Over all questions, nats a token."""
    return max(one.gap(two) for one, two in zip(said, other, strict=True))


@dataclass(frozen=True)
class Case:
    """A state of the Hub, and what is to be heard of it.

    `expected` is what the engine said of the model that must be got, `other` of one that is there too and must not be.
    """

    name: str
    repo_id: str
    expected: list[Said]
    other: list[Said]
    ways: tuple[str, ...]
    revision: str = CHAMPION
    by_card: bool = False  # Whether the lines of its card are run too: they load main.
    may_refuse: str = ""  # A way that may load nothing, and must not load something else.


@dataclass(frozen=True)
class Row:
    """What one environment got by one way of loading. Gaps are the largest of any fixed answer, nats a token.

    `gap` is that to what the engine said; `to_the_other` that to the model which must not be got.
    """

    transformers: str
    case: str
    way: str
    differs: list[str]
    gap: float | None = None
    to_the_other: float | None = None
    why_not: str = ""
    may_refuse: bool = False

    @property
    def holds(self) -> bool:
        """Whether it is the model that was asked for, and could be told from the other one."""
        if self.may_refuse and self.why_not:
            return True
        near = self.gap is None or self.gap <= EXACT
        far = self.to_the_other is None or self.to_the_other > 10 * EXACT
        return not (self.why_not or self.differs) and near and far


@dataclass(frozen=True)
class Trained:
    """What the engine says of a policy, and of its base."""

    policy: list[Said]
    base: list[Said]


class Log:
    """Lines of a stage, to nobody."""

    def log(self, message: str) -> None:
        """Lets it go."""


@dataclass(frozen=True)
class Pipelines:
    """Pipelines of this benchmark: one Hub, one Dagster instance."""

    hub: HubServer
    instance: dg.DagsterInstance
    base_revision: str

    def recipe(self, artifact: str, **changes: Mapping[str, Any]) -> dict[str, Any]:
        """A short training of the base on the Hub, released as this artefact."""
        repo_id = {"merged": MERGED, "adapter": ADAPTER}[artifact]
        publishing = {"dry_run": False, "repo_id": repo_id, "endpoint": self.hub.endpoint, "artifact": artifact}
        base = {"source": BASE, "revision": self.base_revision, "licence": "mit"}
        return short_recipe(base_model=base, publishing=publishing, **changes)

    def train(self, name: str, recipe: Mapping[str, Any]) -> Trained:
        """What the engine says of a policy that was trained and not sent yet."""
        made = materialize(recipe, self.instance, TRAINED, name=name)
        _require(made)
        shown = {node: Path(metadata(made, node)["path"]) for node in TRAINED}
        base, plan = shown["base_model"] / "model", read_plan(open_artifact(shown["dpo_plan"])).at_release()
        if recipe["publishing"]["artifact"] == "adapter":
            policy = by_the_engine(base, shown["dpo_adapter"] / "adapter", base, plan)
        else:
            policy = by_the_engine(shown["merged_model"] / "model", None, base, plan)
        return Trained(policy, by_the_engine(base, None, base, plan))

    def release(self, name: str, recipe: Mapping[str, Any]) -> str:
        """The commit of the release."""
        config = {"ops": {f"{name}__promotion": {"config": {"override": "promote", "reason": WHY}}}}
        sent = materialize(recipe, self.instance, DECIDED, name=name, run_config=config)
        _require(sent)
        return str(metadata(sent, "published_model")["champion"])

    def roll_back(self, name: str, recipe: Mapping[str, Any]) -> None:
        """The release before is live again."""
        job = build_dpo_defs(name, recipe).resolve_job_def(f"{name}_rollback")
        config = {"ops": {f"{name}__rollback": {"config": {"to": "", "reason": WHY}}}}
        _require(job.execute_in_process(instance=self.instance, run_config=config, raise_on_error=False))


def _require(result: dg.ExecuteInProcessResult) -> None:
    if not result.success:
        raise SystemExit("\n".join(failures(result)) or "the run failed")


def by_the_engine(model: Path, adapter: Path | None, base: Path, plan: TrainingPlan) -> list[Said]:
    """What the pipeline says: its own rendering and tokens, and the engine that scores and answers in `eval_scores`."""
    chat = load_chat_format(base, TemplateSettings())
    table = pl.DataFrame(
        [
            {
                "pair_id": str(n),
                "prompt": list(question.messages),
                **{
                    side: [{"role": "assistant", "content": content}]
                    for side, content in zip(("chosen", "rejected"), question.answers, strict=True)
                },
            }
            for n, question in enumerate(QUESTIONS)
        ]
    )
    pairs = PairTokenizer(chat)
    rows = pairs.encoded(pairs.rendered(table)).to_dicts()
    if faults := [row["template_fault"] for row in rows if row["template_fault"]]:
        raise SystemExit(f"the pipeline itself would not ask this: {faults}")
    groups = [Group(row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"])) for row in rows]
    prompts = [chat.prompt_ids(question.messages) for question in QUESTIONS]
    bench = Bench(plan, TOKENS, 0, Log(), Parts(None, {}))
    _, [measured] = bench.measure([Subject("release", model, adapter, Reading(chat, groups, prompts), {})])
    texts = chat.texts([question.messages for question in QUESTIONS], answer_follows=True)
    return [
        Said(
            text,
            list(prompt),
            answer["ids"] + ([answer["end"]] if answer["ended"] else []),
            answer["text"],
            [list(completion) for completion in group.completions],
            list(logps),
        )
        for text, prompt, answer, group, logps in zip(
            texts, prompts, measured.answers, groups, measured.logps, strict=True
        )
    ]


@dataclass(frozen=True)
class Environment:
    """An interpreter that knows nothing of this project, with a cache of its own."""

    python: str
    home: Path
    hub: HubServer

    def rows(self, case: Case) -> tuple[dict[str, str], list[Row]]:
        """(versions, a row for each way of loading)."""
        told = self.ask(case)
        place = (told["versions"]["transformers"], case.name)
        held = self.hub.repo(case.repo_id).resolve(case.revision).oid
        moved, rows = [] if told["commit"] == held else ["commit"], []
        for way in case.ways:
            if way in told["why_not"]:
                rows.append(Row(*place, way, moved, why_not=told["why_not"][way], may_refuse=way == case.may_refuse))
                continue
            said = [Said(**one) for one in told["said"][way]]
            gaps = largest_gap(said, case.expected), largest_gap(said, case.other)
            rows.append(Row(*place, way, moved + differences(said, case.expected), *gaps))
        if case.by_card:
            rows.append(Row(*place, "lines of its card", [] if told["card"] == case.expected[0].spoken else ["spoken"]))
        return told["versions"], rows

    def ask(self, case: Case) -> dict[str, Any]:
        """What `redownload_other.answer` gives."""
        questions = [{"messages": list(one.messages), "answers": list(one.answers)} for one in QUESTIONS]
        request = {"repo_id": case.repo_id, "revision": case.revision, "ways": case.ways, "tokens": TOKENS}
        request |= {"card": case.by_card}
        file = self.home / "request.json"
        file.write_text(json.dumps(request | {"questions": questions}), encoding="utf-8")
        command = [self.python, "-I", str(Path(redownload_other.__file__)), str(file)]
        subprocess.run(command, check=True, cwd=self.home, env=self._variables())
        told: dict[str, Any] = json.loads(file.with_suffix(".answer.json").read_text(encoding="utf-8"))
        if told["has_this_project"]:
            raise SystemExit(f"{self.python} has this project installed, so what it shows is not what others see")
        return told

    def _variables(self) -> dict[str, str]:
        passed = {name: os.environ[name] for name in os.environ if name.startswith("HF_HUB_DISABLE_")}
        own = {"HOME": str(self.home), "HF_HOME": str(self.home / "cache"), "OMP_NUM_THREADS": "1"}
        # Releases are private, so who downloads one has a token.
        hub = {"HF_ENDPOINT": self.hub.endpoint, "HF_TOKEN": self.hub.token}
        return passed | own | hub | {"PATH": os.environ["PATH"]}


def cases(pipelines: Pipelines, api: HfApi) -> Iterator[Case]:
    """One state of the Hub after the other; each stands until the next is asked for."""
    once, longer = pipelines.recipe("merged"), pipelines.recipe("merged", sft={"epochs": 3.0})
    trained = pipelines.train("bot", once)
    first, base = trained.policy, trained.base
    pipelines.release("bot", once)
    yield Case("first release", MERGED, first, base, (AUTO,), by_card=True)
    second = pipelines.train("bot", longer).policy
    pipelines.release("bot", longer)
    yield Case("second release", MERGED, second, first, (AUTO,), by_card=True)

    pipelines.roll_back("bot", longer)
    yield Case("first release again, rolled back", MERGED, first, second, (AUTO,), by_card=True)
    weights = BASE_FOLDER / WEIGHTS
    api.upload_file(repo_id=MERGED, path_or_fileobj=weights, path_in_repo=WEIGHTS, commit_message="By a colleague")
    yield Case("the same, others' weights on main", MERGED, first, base, (AUTO,))
    yield Case("main, for comparison", MERGED, base, first, (AUTO,), revision="main")

    adapter = pipelines.recipe("adapter")
    policy = pipelines.train("adapter", adapter).policy
    pipelines.release("adapter", adapter)
    # AutoModelForCausalLM looks for the base at the revision of the adapter, where there is none.
    yield Case("adapter release", ADAPTER, policy, base, (AUTO_PEFT, ON_BASE, AUTO), by_card=True, may_refuse=AUTO)


def run(pythons: Sequence[str], work: Path) -> tuple[list[dict[str, str]], list[Row]]:
    """(versions of each environment, rows).

    Args:
        pythons: interpreters of the environments.
        work: an empty folder.
    """
    rows: list[Row] = []
    versions: dict[str, dict[str, str]] = {}
    with HubServer() as hub, dg.DagsterInstance.local_temp(str(_made(work / "dagster"))) as instance:
        os.environ["HF_TOKEN"] = hub.token
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        api.create_repo(BASE, private=True)
        revision = api.upload_folder(repo_id=BASE, folder_path=BASE_FOLDER).oid
        environments = [Environment(python, _made(work / f"home-{n}"), hub) for n, python in enumerate(pythons)]
        for case in cases(Pipelines(hub, instance, revision), api):
            print(f"asking for: {case.name}", file=sys.stderr)
            for environment in environments:
                versions[environment.python], seen = environment.rows(case)
                rows += seen
    return list(versions.values()), rows


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def make_environment(folder: Path, *requirements: str) -> str:
    """The interpreter of a new environment with torch, Transformers and PEFT, and nothing of this project."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
    return python


def both_environments(folder: Path) -> list[str]:
    """As constraints.txt has it, and the earlier line of Transformers on the same torch and PEFT."""
    pins = dict(line.split("==") for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines() if "==" in line[1:])
    shared = [f"{name}=={pins[name]}" for name in ("torch", "peft", "safetensors")]
    now = ("-c", str(CONSTRAINTS), "transformers", *shared, "jinja2")
    return [
        make_environment(folder / "now", *now),
        make_environment(folder / "earlier", f"transformers=={EARLIER}", *shared, "jinja2"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--python", action="append", default=[], help="interpreter of a clean environment; may be given several times"
    )
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(prefix="dpo-assets-redownload-") as work:
        pythons = arguments.python or both_environments(_made(Path(work) / "environments"))
        versions, rows = run(pythons, Path(work))
    for each in versions:
        print("environment:", ", ".join(f"{name} {number}" for name, number in each.items()))
    print("\n| transformers | case | by | differs from the engine in | nats a token | to the other model |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        told = f"not loaded: {row.why_not[:100]}" if row.why_not else ", ".join(row.differs) or "nothing"
        gaps = ("" if gap is None else f"{gap:.1g}" for gap in (row.gap, row.to_the_other))
        print(f"| {' | '.join((row.transformers, row.case, row.way, told, *gaps))} |{'' if row.holds else ' FAULT'}")
    if not all(row.holds for row in rows):
        raise SystemExit("what others download is not what the pipeline released")


if __name__ == "__main__":
    main()
