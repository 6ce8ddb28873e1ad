"""The asset `reward_model_scores`: a small reward model, really trained, loaded and run by the worker."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dpo_assets.assets.scorers_ahead import refuse_scorers
from dpo_assets.checks.judged import reward_model_verdicts
from dpo_assets.checks.reports import RewardModelScores
from dpo_assets.checks.statistics import wilson
from dpo_assets.contract import RewardSpec
from dpo_assets.errors import ConfigError
from dpo_assets.judging.rewards import TOO_LONG, Rewarded, summarise
from dpo_assets.planning.model_folder import refuse_as_reward_model
from dpo_assets.recipe import parse_recipe, resolve_paths
from dpo_assets.resources.hub import HubResource
from dpo_assets.training.models.chat_format import load_chat_format
from dpo_assets.training.models.reward_model import load_reward_model
from dpo_assets.training.scoring.rewards import rewards
from dpo_assets.training.stages import reward
from dpo_assets_tests.hub_server import HubServer
from dpo_assets_tests.judging.test_judged_answers import PAIRS, PROMPTS, fill
from dpo_assets_tests.pipelines import STORIES, demo_recipe, failed_checks, failures, materialize, metadata
from dpo_assets_tests.samples import SHA, plan, recipe, reward_model_scores
from dpo_assets_tests.test_lineage import Shelf

ON_CPU: dict[str, Any] = {"device": "cpu", "precision": "fp32"}
STEPS = 30


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K with a head, trained on pairs whose longer answer was chosen (Bradley-Terry, as TRL's trainer)."""
    folder = tmp_path_factory.mktemp("rewards") / "model"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(STORIES, num_labels=1)
    chat = load_chat_format(STORIES)
    said = ["a longer one, by far", "an answer that is a longer one by far, of a person", "it is longer by far"]
    short = ["no", "a short one", "short"]
    asked = [{"role": "user", "content": "Question 1?"}]
    sides = [
        chat.tokenizer(
            chat.texts([[*asked, {"role": "assistant", "content": text}] for text in texts], answer_follows=False),
            add_special_tokens=False,
            return_tensors="pt",
            padding=True,
        )
        for texts in (said, short)
    ]
    model.config.pad_token_id = chat.tokenizer.pad_token_id
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        chosen, rejected = (model(s["input_ids"], attention_mask=s["attention_mask"]).logits[:, 0] for s in sides)
        loss = -logsigmoid(chosen - rejected).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1
    shutil.copytree(STORIES, folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    with dg.DagsterInstance.ephemeral(tempdir=str(tmp_path)) as opened:
        yield Shelf(opened)


def spec(folder: Path, out: Path, answers: Path, people: Path, **changes: Any) -> RewardSpec:
    out.mkdir(exist_ok=True)
    values: dict[str, Any] = {
        "output_dir": out, "fingerprint": "f" * 32, "inputs": {}, "base_model": folder, "plan": plan(**ON_CPU),
        "answers": answers, "people": people, "human_pairs": 100, "max_length": 512, "confidence": 0.95, "name": "r",
    }  # fmt: skip
    return RewardSpec.model_validate(values | changes)


class Log:
    """A reporter that nobody reads."""

    def log(self, message: str) -> None: ...


def declaring(folder: Path, **more: Any) -> dict[str, Any]:
    return demo_recipe(evaluation={"reward_model": {"source": str(folder), **more}})


def test_a_trained_reward_model_scores_answers_and_is_held_against_people(shelf: Shelf, trained: Path) -> None:
    fill(shelf, of_plan=ON_CPU)
    result = materialize(declaring(trained), shelf.instance, ["reward_model_scores"])
    assert result.success, failures(result)
    folder = Path(metadata(result, "reward_model_scores")["path"])
    found = RewardModelScores.model_validate_json((folder / "report.json").read_text())
    assert (found.wins, found.losses, found.human_pairs, found.agreement.value) == (PROMPTS, 0, PAIRS, 1.0)
    assert found.corrected.value == 1.0
    assert found.difference.low is not None
    assert found.difference.low > 0
    assert failed_checks(result) == {}
    told = json.loads((folder / "rewarded.json").read_text())
    assert [row["rewards"][0] > row["rewards"][1] for row in told] == [True] * PROMPTS
    kept = shelf.tree.root / "reward_model"
    copy = next(kept.glob("*/model/model.safetensors"))
    assert not copy.samefile(trained / "model.safetensors"), "what the user changes later must not reach it"
    assert copy.read_bytes() == (trained / "model.safetensors").read_bytes()
    again = materialize(declaring(trained), shelf.instance, ["reward_model_scores"])
    assert metadata(again, "reward_model_scores")["reused"].startswith("yes")


def test_a_reward_does_not_depend_on_the_rows_beside_it_nor_on_the_padding(trained: Path) -> None:
    model = load_reward_model(trained, plan(**ON_CPU))
    rows = [list(range(4, 4 + n)) for n in (3, 40, 7, 25, 3)]
    together = rewards(model, rows, budget=100)
    alone = [float(model(torch.tensor([row])).logits[0, 0].detach()) for row in rows]
    assert together == pytest.approx(alone, abs=1e-5)
    model.config.pad_token_id = None
    assert rewards(model, rows, budget=100) == pytest.approx(alone, abs=1e-5)


def test_what_has_no_reward_is_counted_with_the_reason_and_not_cut(trained: Path, tmp_path: Path, shelf: Shelf) -> None:
    fill(shelf, better=4, of_plan=ON_CPU)
    answers, people = shelf.now["eval_scores"].path / "generations.json", shelf.now["dpo_dataset"].path
    reward.run(spec(trained, tmp_path / "out", answers, people, max_length=28), Log())
    found = RewardModelScores.model_validate_json((tmp_path / "out" / "report.json").read_text())
    assert found.left_out == {TOO_LONG: 4}
    assert found.wins + found.ties + found.losses == PROMPTS - 4
    assert found.human_left_out == {TOO_LONG: PAIRS}
    assert not reward_model_verdicts(found)[0].passed


def test_a_language_model_without_a_trained_head_is_no_reward_model(trained: Path, tmp_path: Path) -> None:
    """Transformers would draw the head at random, and say so in a warning."""
    headless = tmp_path / "model"
    shutil.copytree(trained, headless)
    AutoModelForCausalLM.from_pretrained(STORIES).save_pretrained(headless)
    shutil.copy(trained / "config.json", headless / "config.json")
    with pytest.raises(ConfigError, match=r"no file holds score\.weight"):
        load_reward_model(headless, plan(**ON_CPU))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "is a sequence classifier"),
        ({"id2label": {"0": "bad", "1": "good"}}, "has 2 outputs"),
        ({"id2label": None}, "has 2 outputs"),  # What Transformers takes where nothing is said.
    ],
    ids=["causal", "two labels", "unsaid"],
)
def test_a_folder_that_is_no_reward_model_is_refused_before_training(
    trained: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(trained, folder)
    refuse_as_reward_model(folder)
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    evaluation = recipe(evaluation={"reward_model": {"source": str(folder)}}).evaluation
    with pytest.raises(ConfigError, match=said):
        refuse_scorers(evaluation, HubResource())


def test_a_reward_model_without_safetensors_or_template_or_folder_is_refused(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with pytest.raises(ConfigError, match="there is no folder"):
        refuse_as_reward_model(folder)
    shutil.copytree(trained, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="no safetensors weights"):
        refuse_as_reward_model(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in tokenizer.items() if "chat" not in k}))
    with pytest.raises(ConfigError, match="has no chat template"):
        refuse_as_reward_model(folder)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("", ""),
        ("config.json", r"org/judge holds LlamaForCausalLM"),
        ("model.safetensors", r"org/judge holds no safetensors weights"),
        ("token", r"no model org/judge, or the token in MY_HUB_LOGIN may not see it"),
        ("revision", r"org/judge has no revision"),
        ("silent", ""),
    ],
)
def test_a_reward_model_of_the_hub_is_looked_at_before_training_without_its_weights(
    trained: Path, broken: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A typing error in its name, or a model of another kind, was found after the training."""
    files = {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    if broken == "config.json":
        files[broken] = json.dumps(json.loads(files[broken]) | {"architectures": ["LlamaForCausalLM"]}).encode()
    if broken == "model.safetensors":
        files["pytorch_model.bin"] = files.pop(broken)
    with HubServer(token="hf_test") as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        api.create_repo("org/judge", private=True)
        adding = [CommitOperationAdd(name, data) for name, data in files.items()]
        commit = api.create_commit("org/judge", operations=adding, commit_message="a reward model")
        monkeypatch.setenv("MY_HUB_LOGIN", "" if broken == "token" else "hf_test")
        resource = HubResource(endpoint=hub.endpoint, token_variable="MY_HUB_LOGIN")
        source = {"source": "org/judge", "revision": SHA if broken == "revision" else commit.oid}
        evaluation = recipe(evaluation={"reward_model": source}).evaluation
        asked = len(hub.requests)
        if said:
            with pytest.raises(ConfigError, match=said):
                refuse_scorers(evaluation, resource)
        elif not broken:
            assert refuse_scorers(evaluation, resource) == ""
            assert not any("model.safetensors" in request.path for request in hub.requests[asked:])
    if broken == "silent":
        assert "could not be downloaded" in refuse_scorers(evaluation, resource)  # Nobody listens any more.


def test_a_reward_model_of_the_hub_is_named_by_a_commit() -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.reward_model.*needs `revision`"):
        parse_recipe(demo_recipe(evaluation={"reward_model": {"source": "org/model", "revision": "main"}}))


def test_a_folder_is_looked_for_beside_the_recipe_and_a_model_of_the_hub_is_not() -> None:
    def source(**model: str) -> str:
        resolved = resolve_paths(recipe(evaluation={"reward_model": model}), Path("/project"))
        assert resolved.evaluation.reward_model is not None
        return resolved.evaluation.reward_model.source

    assert source(source="./rewards") == "/project/rewards"
    assert source(source="org/model", revision=SHA) == "org/model"


def test_ties_count_half_and_what_errs_is_corrected_by_what_people_chose() -> None:
    def each(rewards: tuple[float, float], lengths: tuple[int, int], numbers: range) -> list[Rewarded]:
        return [Rewarded(rewards, lengths, f"{number}") for number in numbers]

    pairs = [
        *each((1.0, 0.0), (9, 5), range(6)), *each((0.0, 0.0), (5, 5), range(6, 8)),
        *each((0.0, 1.0), (5, 9), range(8, 10)),
    ]  # fmt: skip
    people = each((1.0, 0.0), (5, 5), range(20, 100)) + each((0.0, 1.0), (5, 5), range(100, 120))
    found = summarise("r", [*pairs, Rewarded(None, (1, 1), "10", TOO_LONG)], people, 0.95)
    assert (found.wins, found.ties, found.losses, found.left_out) == (6, 2, 2, {TOO_LONG: 1})
    assert (found.share.value, found.share.n, found.share.clusters) == (0.7, 10, 10)
    assert found.difference.value == pytest.approx(0.4)
    assert found.agreement.low == pytest.approx(wilson(80, 100).low)
    assert found.corrected.value == pytest.approx((0.7 + 0.8 - 1) / (2 * 0.8 - 1))
    assert found.share_at_equal_length == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"agreement": wilson(52, 100)}, "may be chance"),
        ({"agreement": wilson(3, 3)}, "held against 3 conversations"),
        ({"left_out": {TOO_LONG: 20}}, TOO_LONG),
        ({"wins": 0, "ties": 0, "losses": 0, "human_pairs": 0}, "nothing was scored"),
    ],
    ids=["agreement", "few people", "too long", "nothing"],
)
def test_a_reward_model_that_cannot_be_believed_is_told_by_what(changes: dict[str, Any], fix: str) -> None:
    assert [v.passed for v in reward_model_verdicts(reward_model_scores())] == [True, True]
    health, _ = reward_model_verdicts(reward_model_scores(**changes))
    assert not health.passed
    assert fix in health.fix
