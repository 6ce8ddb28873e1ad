"""Releases: what is staged, what is kept out, and what the Hub holds after every way a publication can go."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import CommitInfo, HfApi
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_assets.artifact import seal
from dpo_assets.assets.published_model import verify
from dpo_assets.errors import ConfigError, GateError
from dpo_assets.publishing.card import render_card
from dpo_assets.publishing.commit import Operation, PublishError, Release, content_tag, publish, stage, staged_files
from dpo_assets.publishing.secrets import SECRET_VARIABLES, find_secrets, name_secrets, scrub
from dpo_assets.secret_shapes import MASK, PATTERNS
from dpo_assets_tests.hub_server import HubServer, Repo
from dpo_assets_tests.publishing.test_card import facts

REPO = "org/bot"
CARD = "---\nlicense: mit\n---\n# Bot\n"
PROVENANCE = {"inputs": {"base_model": "d" * 64}}
MODEL = {
    "model.safetensors": bytes(range(256)) * 4,
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
}
STAGED = {*MODEL, "README.md", "provenance.json"}


def staged(folder: Path, files: dict[str, bytes] | None = None, card: str = CARD) -> tuple[Path, list[Operation]]:
    """A staged release of MODEL with `files` laid over it."""
    number = len(list(folder.iterdir()))
    source, target = folder / f"model-{number}", folder / f"release-{number}"
    source.mkdir()
    target.mkdir()
    for name, data in (MODEL | (files or {})).items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    return target, stage(source, target, card, PROVENANCE)


# Staging


def test_a_release_holds_the_model_the_card_and_the_provenance(tmp_path: Path) -> None:
    target, operations = staged(tmp_path)
    # In order of names, so that equal releases are equal lists and get equal tags.
    assert [o.path for o in operations] == sorted(STAGED) == sorted(path.name for path in target.iterdir())
    assert {o.action for o in operations} == {"add"}
    for operation in operations:
        content = (target / operation.path).read_bytes()
        assert (operation.size, operation.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert (target / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
    assert json.loads((target / "provenance.json").read_text()) == PROVENANCE


UNWANTED = [
    "training_args.bin",
    "optimizer.pt",
    "pytorch_model.bin",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "model.pkl",
    ".env",
    "checkpoint-1/model.safetensors",
    "notes.txt",
    "license.py",
    "LICENSE.pkl",
    "other/LICENSE",
    "additional_chat_templates/run.py",
    "train.parquet",
    "manifest.json",
]


@pytest.mark.parametrize("name", UNWANTED)
def test_what_is_not_on_the_list_is_left_behind(tmp_path: Path, name: str) -> None:
    _, operations = staged(tmp_path, {name: b"x"})
    assert {o.path for o in operations} == STAGED


@pytest.mark.parametrize("name", ["tokenizer.pkl", "tokenizer.bin", "tokenizer_state.pt", "NOTICE.bin"])
def test_a_pickle_is_left_behind_whatever_its_name(tmp_path: Path, name: str) -> None:
    _, operations = staged(tmp_path, {name: b"\x80\x04."})
    assert {o.path for o in operations} == STAGED


@pytest.mark.parametrize(
    "name",
    [
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "adapter_model.safetensors",
        "adapter_config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.model",
        "tekken.json",
        "additional_chat_templates/tool_use.jinja",
        "LICENSE.txt",
        "NOTICE",
        "USE_POLICY.md",
        "Community License for the Model.pdf",
    ],
)
def test_what_a_model_or_an_adapter_needs_is_taken(tmp_path: Path, name: str) -> None:
    target, operations = staged(tmp_path, {name: b"{}"})
    assert {o.path for o in operations} == STAGED | {name}
    assert (target / name).read_bytes() == b"{}"


def test_the_card_of_the_base_model_is_replaced_by_the_releases(tmp_path: Path) -> None:
    target, _ = staged(tmp_path, {"README.md": b"# Base model\n", "provenance.json": b"forged"})
    assert (target / "README.md").read_text() == CARD
    assert json.loads((target / "provenance.json").read_text()) == PROVENANCE


TOKEN = "hf_" + "a" * 34


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer.model", "NOTICE", "additional_chat_templates/rag.jinja"],
)
def test_a_text_that_holds_a_token_stops_the_release_and_the_token_is_not_repeated(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        staged(tmp_path, {name: f'{{"x": "{TOKEN}"}}\xff'.encode("latin-1")})
    assert str(refused.value) == f"{name} of the release seems to hold a Hugging Face token; nothing was sent."


def test_a_card_or_a_provenance_that_holds_a_token_stops_the_release(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"README\.md of the release"):
        staged(tmp_path, card=f"{CARD}{TOKEN}")
    (tmp_path / "target").mkdir()
    with pytest.raises(ConfigError, match=r"provenance\.json of the release"):
        stage(tmp_path / "model-0", tmp_path / "target", CARD, {"token": TOKEN})


def test_the_tag_names_the_content_and_nothing_else(tmp_path: Path) -> None:
    tags = [
        content_tag(staged(tmp_path, files)[1]) for files in ({}, {}, {"config.json": b"{}"}, {"tokenizer.model": b""})
    ]
    assert tags[0] == tags[1]
    assert len(set(tags)) == 3
    assert all(tag.startswith("content-") and len(tag) == len("content-") + 12 for tag in tags)


# Publishing


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(token="hf_test") as server:
        yield server


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=hub.token)


def send(api: HfApi, release: tuple[Path, list[Operation]]) -> Release:
    return publish(api, REPO, *release, private=True, token_variable="HF_TOKEN")


def summaries(repo: Repo) -> list[str]:
    return [commit.summary for commit in repo.history()]


def test_a_release_is_one_commit_with_a_tag_and_reads_back_equal(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    folder, operations = staged(tmp_path, {"additional_chat_templates/tool_use.jinja": b"{{ tools }}"})
    release = send(api, (folder, operations))
    repo = hub.repo(REPO)
    assert summaries(repo) == [f"Release {release.tag}", "initial commit"]
    assert repo.files() == {name: (folder / name).read_bytes() for name in staged_files(folder)} | {
        ".gitattributes": repo.files()[".gitattributes"]
    }
    assert repo.tags == {content_tag(operations): release.commit} == {release.tag: repo.resolve().oid}
    assert release == Release(f"{hub.endpoint}/{REPO}", release.commit, release.tag, sent=True, read_back=True)
    assert repo.private


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_is_as_private_as_the_recipe_says(
    hub: HubServer, api: HfApi, tmp_path: Path, private: bool
) -> None:
    publish(api, REPO, *staged(tmp_path), private=private, token_variable="HF_TOKEN")
    assert hub.repo(REPO).private is private


def test_the_same_release_again_changes_nothing_on_the_hub(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    first = send(api, staged(tmp_path))
    before = hub.repo(REPO).files(), summaries(hub.repo(REPO)), dict(hub.repo(REPO).tags)
    again = send(api, staged(tmp_path))
    assert (again.commit, again.tag, again.sent, again.read_back) == (first.commit, first.tag, False, False)
    assert (hub.repo(REPO).files(), summaries(hub.repo(REPO)), hub.repo(REPO).tags) == before


def test_a_new_release_replaces_the_old_one_and_removes_what_it_no_longer_holds(
    hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    first = send(api, staged(tmp_path, {"tokenizer.model": b"old", "config.json": b'{"v": 1}'}))
    second = send(api, staged(tmp_path, {"config.json": b'{"v": 2}'}))
    repo = hub.repo(REPO)
    assert set(repo.files()) == STAGED | {".gitattributes"}
    assert repo.files()["config.json"] == b'{"v": 2}'
    # The release before stays where its tag is.
    assert repo.tags == {first.tag: first.commit, second.tag: second.commit}
    assert repo.files(first.tag)["tokenizer.model"] == b"old"


def test_files_that_others_put_beside_a_release_are_removed_with_the_next_one(
    hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    send(api, staged(tmp_path))
    repo = hub.repo(REPO)
    repo.commit("by hand", repo.resolve().files | {"pytorch_model.bin": repo.resolve().files["config.json"]})
    send(api, staged(tmp_path, {"config.json": b"{}"}))
    assert set(repo.files()) == STAGED | {".gitattributes"}


class Interrupted(HfApi):
    """A client at whose commit something happens, before or after it."""

    def __init__(self, hub: HubServer, *, before: Callable[[], Any] = list, after: Callable[[], Any] = list) -> None:
        super().__init__(endpoint=hub.endpoint, token=hub.token)
        self.before, self.after = before, after

    def create_commit(self, *args: Any, **options: Any) -> CommitInfo:
        self.before()
        commit = super().create_commit(*args, **options)
        self.after()
        return commit


def test_another_writers_commit_is_not_overwritten(hub: HubServer, tmp_path: Path) -> None:
    def write_between() -> None:
        repo = hub.repo(REPO)
        repo.commit("another writer", repo.resolve().files)

    with pytest.raises(PublishError, match=r"publishing org/bot failed: .*412"):
        send(Interrupted(hub, before=write_between), staged(tmp_path))
    assert summaries(hub.repo(REPO)) == ["another writer", "initial commit"]
    assert hub.repo(REPO).tags == {}
    # A second try reads the new head and goes on from there.
    assert send(Interrupted(hub), staged(tmp_path)).sent
    assert summaries(hub.repo(REPO))[1] == "another writer"


def test_corrupted_bytes_are_noticed_when_the_release_is_read_back(hub: HubServer, tmp_path: Path) -> None:
    corrupt = Interrupted(hub, after=lambda: hub.repo(REPO).flip_byte("model.safetensors"))
    with pytest.raises(GateError, match=r"model\.safetensors at org/bot@[0-9a-f]{40} is not what was sent") as red:
        send(corrupt, staged(tmp_path))
    assert red.value.check == "release_verified"


def test_a_release_that_did_not_read_back_equal_is_no_success_on_the_next_try(
    hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    corrupt = Interrupted(hub, after=lambda: hub.repo(REPO).flip_byte("model.safetensors"))
    with pytest.raises(GateError):
        send(corrupt, staged(tmp_path))
    with pytest.raises(GateError):
        send(api, staged(tmp_path))


def test_a_release_that_did_not_read_back_equal_gets_no_tag(hub: HubServer, tmp_path: Path) -> None:
    corrupt = Interrupted(hub, after=lambda: hub.repo(REPO).flip_byte("config.json"))
    with pytest.raises(GateError):
        send(corrupt, staged(tmp_path))
    assert hub.repo(REPO).tags == {}


def test_a_tag_of_this_content_on_another_commit_is_a_failure_and_is_not_moved(
    hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    folder, operations = staged(tmp_path)
    api.create_repo(REPO)
    elsewhere = hub.repo(REPO).resolve().oid
    hub.repo(REPO).tags[content_tag(operations)] = elsewhere
    head = hub.repo(REPO).commit("by hand", hub.repo(REPO).resolve().files)
    with pytest.raises(GateError, match=f"points at {elsewhere}"):
        send(api, (folder, operations))
    assert hub.repo(REPO).tags == {content_tag(operations): elsewhere}
    assert hub.repo(REPO).resolve() == head


def test_going_back_to_an_older_release_works(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    first = send(api, staged(tmp_path))
    send(api, staged(tmp_path, {"config.json": b"{}"}))
    back = send(api, staged(tmp_path))
    assert back.tag == first.tag
    assert hub.repo(REPO).files(back.commit) == hub.repo(REPO).files(first.commit)
    assert hub.repo(REPO).files()["config.json"] == MODEL["config.json"]


def test_a_refusal_because_of_a_tag_leaves_the_head_as_it_was(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    send(api, staged(tmp_path))
    second = send(api, staged(tmp_path, {"config.json": b"{}"}))
    try:
        send(api, staged(tmp_path))
    except PublishError:
        assert hub.repo(REPO).resolve().oid == second.commit


def test_a_commit_whose_answer_is_lost_is_made_once_and_tagged_by_the_next_try(
    hub: HubServer, api: HfApi, tmp_path: Path
) -> None:
    hub.fail_next("POST", "/commit/", lost_response=True)
    with pytest.raises((PublishError, httpx.TransportError)):
        send(api, staged(tmp_path))
    release = send(api, staged(tmp_path))
    repo = hub.repo(REPO)
    assert summaries(repo) == [f"Release {release.tag}", "initial commit"]
    assert repo.tags == {release.tag: repo.resolve().oid}
    # The second try found the commit there: it sent nothing, and compared what the first one had sent.
    assert (release.commit, release.sent, release.read_back) == (repo.resolve().oid, False, True)


@pytest.mark.parametrize(
    ("sent", "read_back", "said"),
    [
        (True, True, "7 files, commit 0123456789ab, sent, re-downloaded and equal"),
        (False, True, "7 files, commit 0123456789ab was there already, nothing sent, re-downloaded and equal"),
        (False, False, "7 files, commit 0123456789ab was there already, nothing sent, found equal when it was tagged"),
        (None, None, "7 files, nothing sent"),
    ],
)
def test_the_check_of_a_release_says_what_this_run_did(
    tmp_path: Path, sent: bool | None, read_back: bool | None, said: str
) -> None:
    (tmp_path / "work").mkdir()
    target, operations = staged(tmp_path / "work")
    target.rename(tmp_path / "release")
    artifact = seal(tmp_path, kind="published_model", fingerprint="f" * 32, inputs={})
    release = None if sent is None else Release("u", "0123456789abcdef", "t", sent=sent, read_back=bool(read_back))
    verdict = verify(artifact, operations, release)
    assert (verdict.level, verdict.value) == ("pass", said)
    (tmp_path / "release" / "config.json").write_text("{}")
    assert verify(artifact, operations, release).level == "error"


def test_a_lost_answer_is_a_publish_error(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    hub.fail_next("POST", "/commit/", lost_response=True)
    with pytest.raises(PublishError):
        send(api, staged(tmp_path))


def test_a_hub_that_cannot_be_reached_is_a_publish_error(tmp_path: Path) -> None:
    with HubServer() as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
    with pytest.raises(PublishError):
        send(api, staged(tmp_path))


def test_a_refused_upload_is_a_publish_error_and_leaves_no_commit(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    hub.fail_next("PUT", "/lfs-storage/", status=403)
    with pytest.raises(PublishError):
        send(api, staged(tmp_path))
    assert summaries(hub.repo(REPO)) == ["initial commit"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/repos/create"),
        ("GET", "/refs$"),
        ("GET", "/api/models/org/bot$"),
        ("POST", "/preupload/"),
        ("POST", "/commit/"),
        ("POST", "/tag/"),
        ("GET", "/resolve/"),
    ],
)
def test_a_refusal_at_any_step_is_told_by_the_tokens_variable_and_a_later_run_completes(
    hub: HubServer, api: HfApi, tmp_path: Path, method: str, path: str
) -> None:
    hub.fail_next(method, path, status=403)
    with pytest.raises(ConfigError, match="publishing org/bot is refused: the token in HF_TOKEN must be valid"):
        send(api, staged(tmp_path))
    assert hub.faults.pending == []
    release = send(api, staged(tmp_path))
    repo = hub.repo(REPO)
    assert summaries(repo) == [f"Release {release.tag}", "initial commit"]
    assert repo.tags == {release.tag: repo.resolve().oid}
    assert set(repo.files()) == STAGED | {".gitattributes"}


def test_a_refused_token_changes_nothing_and_is_in_no_text(hub: HubServer, tmp_path: Path) -> None:
    bad = HfApi(endpoint=hub.endpoint, token=TOKEN)
    with pytest.raises(ConfigError) as refused:
        send(bad, staged(tmp_path))
    assert "401" in str(refused.value)
    error: BaseException | None = refused.value
    while error is not None:
        assert TOKEN not in f"{error!s} {error!r}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert hub.repos == {}


def test_a_secret_in_a_refusal_of_the_hub_is_masked(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "plain-words-as-token")

    def refuse() -> None:
        raise OSError(f"{TOKEN} and plain-words-as-token were refused")

    with pytest.raises(PublishError) as refused:
        send(Interrupted(hub, before=refuse), staged(tmp_path))
    assert str(refused.value) == f"publishing org/bot failed: {MASK} and {MASK} were refused"


# Secrets

KEYS = {
    "Hugging Face token": TOKEN,
    "API key (sk-)": "sk-proj-" + "Ab1_" * 10,
    "AWS access key": "AKIA" + "ABCD1234" * 2,
    "GitHub token": "ghp_" + "a1" * 18,
    "GitLab token": "glpat-" + "aB3_" * 5,
    "Google API key": "AIza" + "aB3-_" * 7,
    "Slack token": "xoxb-" + "1234567890-" * 2 + "aBcD",
    "Stripe key": "sk_live_" + "aB3d" * 6,
    "JSON web token": f"eyJ{'hbGci' * 3}.eyJ{'zdWIi' * 3}.{'aB3-_' * 4}",
    "private key": "-----BEGIN OPENSSH PRIVATE KEY-----",
}
BLOCK = "-----BEGIN PGP PRIVATE KEY BLOCK-----\n\nlQOYBGV\n=aB3d\n-----END PGP PRIVATE KEY BLOCK-----"
MORE_KEYS = [
    ("API key (sk-)", "sk-" + "a1B2" * 12),
    ("API key (sk-)", "sk-" + "0123456789abcdef" * 2),
    ("API key (sk-)", "sk-" + "a1B2" * 6 + "-x_Y"),
    ("API key (sk-)", "sk-or-v1-" + "0123456789abcdef" * 4),
    ("API key (sk-)", "sk-ant-api03-" + "Ab1-_" * 18),
    ("API key (sk-)", "sk-svcacct-" + "x-Y7" * 20),
    ("AWS access key", "ASIA" + "WXYZ2345" * 2),
    ("GitHub token", "github_pat_" + "A1" * 11 + "_" + "b2C" * 19 + "dd"),
    ("private key", "-----BEGIN PGP PRIVATE KEY BLOCK-----"),
    ("private key", BLOCK),
    ("private key", "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIIF\n-----END ENCRYPTED PRIVATE KEY-----"),
]
HARMLESS = [
    "risk-assessment-of-the-new-procedure-2024",
    "task-management-and-scheduling-tools",
    "a sk-learn-based-classification-pipeline-v2",
    "the suffix -sk-is-not-a-key-however-long-it-is-2024",
    "sk-SK-translations-of-the-Interface-Strings-2024",
    "sk-proj-is-what-the-keys-of-projects-begin-with",
    "sk-" + "internationalisation" * 2,
    "sk-ant-farm-photographs-of-the-Summer-holidays",
    "github_pat_tokens_expire",
    "ASIA PACIFIC",
    "ASIA2024",
    "-----BEGIN PGP PUBLIC KEY BLOCK-----",
    "-----BEGIN PGP MESSAGE-----",
    "the hf_hub client",
    "hf_transfer",
    "ask-me-anything-about-the-weather-today",
    "AKIA is a prefix",
    "ghp_short",
    "-----BEGIN PUBLIC KEY-----",
    "sk-learn",
    "a" * 40,
    "glpat-is-the-prefix-of-gitlab-tokens",
    "AIza is how the keys of Google begin",
    "xoxb-is-for-bots-of-a-workspace",
    "sk_live_ and rk_test_ are prefixes",
    'eyJ is what {" is in base64: eyJhbGciOiJIUzI1NiJ9',
    "ask for a basic understanding-of-the-matter, and a bearer of bad-news-2024",
    "http://localhost:8080/path@v1 and mailto:someone@example.com",
    "https://example.org/search?page=2&keyboard=us",
    "git@example.com:org/repository.git",
    "set password=None, or leave it",
]


def test_every_kind_of_secret_has_an_example_here() -> None:
    assert set(KEYS) == set(PATTERNS)


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("around", ["{}", "key={} ", '{{"k": "{}"}}', "line\n{}\nline", "({})"])
def test_a_secret_is_found_and_masked_wherever_it_stands(kind: str, around: str) -> None:
    text = around.format(KEYS[kind])
    assert find_secrets(text) == [kind]
    assert KEYS[kind] not in scrub(text)
    assert scrub(text) == around.format(MASK)
    assert find_secrets(scrub(text)) == []


@pytest.mark.parametrize(("kind", "key"), MORE_KEYS, ids=[key[:24] for _, key in MORE_KEYS])
@pytest.mark.parametrize("around", ["{}", "key={} ", '{{"k": "{}"}}'])
def test_every_form_of_a_secret_is_masked_whole(kind: str, key: str, around: str) -> None:
    assert find_secrets(around.format(key)) == [kind]
    assert scrub(around.format(key)) == around.format(MASK)


def test_the_text_between_two_private_keys_stays() -> None:
    assert scrub(f"{BLOCK}\nbetween\n{BLOCK}") == f"{MASK}\nbetween\n{MASK}"


@pytest.mark.parametrize("text", HARMLESS)
def test_ordinary_words_are_no_secret(text: str) -> None:
    assert find_secrets(text) == []
    assert scrub(text) == text


@pytest.mark.parametrize("name", sorted(SECRET_VARIABLES))
def test_the_value_of_a_secret_variable_is_masked_whatever_it_looks_like(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "correct horse battery")
    assert scrub("login: correct horse battery!") == f"login: {MASK}!"


@pytest.mark.parametrize(
    "name", ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "PGPASSWORD", "OPENAI_API_KEY", "DB_PWD", "CLIENT_SECRET"]
)
def test_a_variable_whose_name_says_secret_is_masked(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, 'correct "horse" battery')
    assert scrub('login: correct "horse" battery!') == f"login: {MASK}!"
    assert scrub(r'{"login": "correct \"horse\" battery"}') == f'{{"login": "{MASK}"}}'
    assert scrub("?login=correct%20%22horse%22%20battery") == f"?login={MASK}"


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "PWD", "PYTHONPATH", "KEYBOARD_LAYOUT", "SSH_AUTH_SOCK"])
def test_a_variable_that_only_sounds_like_a_secret_masks_nothing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "correct horse battery")
    assert scrub("login: correct horse battery!") == "login: correct horse battery!"


def test_a_variable_that_a_recipe_names_is_masked_whatever_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_assets.publishing.secrets._NAMED", set())
    monkeypatch.setenv("WHERE_THE_VOTES_ARE", "correct horse battery")
    assert scrub("correct horse battery") == "correct horse battery"
    name_secrets("WHERE_THE_VOTES_ARE")
    assert scrub("correct horse battery") == MASK


def test_the_password_of_a_url_in_any_variable_is_masked_as_written_and_as_meant(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VOTES", "postgresql://reader:swordfish%21@db/votes")
    assert scrub("FATAL: password swordfish! or swordfish%21 refused") == f"FATAL: password {MASK} or {MASK} refused"


def test_a_development_password_that_is_a_word_stops_no_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_PASSWORD", "postgres")
    assert find_secrets('{"vocab": {"postgres": 17}}') == []
    assert scrub("login postgres") == f"login {MASK}"


def test_a_secret_variable_too_short_for_a_secret_masks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "1234567")
    monkeypatch.setenv("WANDB_API_KEY", "")
    assert scrub("call 1234567 now") == "call 1234567 now"
    monkeypatch.setenv("HF_TOKEN", "12345678")
    assert scrub("call 12345678 now") == f"call {MASK} now"


def test_the_value_of_a_secret_variable_stops_a_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2)
    with pytest.raises(ConfigError, match=r"config\.json of the release"):
        staged(tmp_path, {"config.json": b'{"key": "0123456789abcdef0123456789abcdef"}'})


@settings(max_examples=60, deadline=None)
@given(before=st.text(max_size=10), after=st.text(max_size=10), kind=st.sampled_from(sorted(KEYS)))
def test_scrubbing_twice_changes_nothing_more(before: str, after: str, kind: str) -> None:
    once = scrub(f"{before} {KEYS[kind]} {after}")
    assert KEYS[kind] not in once
    assert scrub(once) == once


def test_the_hub_takes_the_card(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    send(api, staged(tmp_path, card=render_card(facts())))
    info = api.model_info(REPO)
    assert (info.library_name, info.pipeline_tag) == ("transformers", "text-generation")
    assert info.card_data is not None
    assert info.card_data.base_model == "org/base"
