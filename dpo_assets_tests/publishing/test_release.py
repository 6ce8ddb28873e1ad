"""Releases: what is staged, what is kept out, secrets, and the card."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_assets.errors import ConfigError
from dpo_assets.publishing.commit import content_tag, stage
from dpo_assets.publishing.plan import FileRecord, ReleaseRecord
from dpo_assets.publishing.secrets import SECRET_VARIABLES, find_secrets, name_secrets, scrub
from dpo_assets.secret_shapes import MASK, PATTERNS

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


def staged(
    folder: Path, files: dict[str, bytes] | None = None, card: str = CARD, pipeline: str = ""
) -> tuple[Path, dict[str, FileRecord]]:
    """A staged release of MODEL with `files` laid over it."""
    number = len(list(folder.iterdir()))
    source, target = folder / f"model-{number}", folder / f"release-{number}"
    source.mkdir()
    target.mkdir()
    for name, data in (MODEL | (files or {})).items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    provenance = PROVENANCE | ({"pipeline": pipeline} if pipeline else {})
    return target, stage(source, target, card, provenance)


# Staging


def test_a_release_holds_the_model_the_card_and_the_provenance(tmp_path: Path) -> None:
    target, files = staged(tmp_path)
    # In order of names, so that equal releases are equal lists and get equal tags.
    assert list(files) == sorted(STAGED) == sorted(path.name for path in target.iterdir())
    for name, file in files.items():
        content = (target / name).read_bytes()
        assert (file.size, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert (target / "model.safetensors").read_bytes() == MODEL["model.safetensors"]


def test_the_provenance_lists_every_other_file_by_its_digests(tmp_path: Path) -> None:
    """By it the next release knows which files of a repository are its own."""
    target, files = staged(tmp_path)
    told = (target / "provenance.json").read_bytes()
    record = ReleaseRecord.read(told)
    assert record is not None
    assert record.files == {name: file for name, file in files.items() if name != "provenance.json"}
    assert json.loads(told).items() >= PROVENANCE.items()
    # git's own id of a file: `printf '{}' | git hash-object --stdin`.
    assert record.files["tokenizer.json"].git_blob == "9e26dfeeb6e641a33dae4961196235bdb965b21b"


@pytest.mark.parametrize("text", [None, b"", b"{}", b'{"made_by": "me", "files": {}}', b'{"made_by": "dpo_assets"}'])
def test_a_provenance_of_others_is_none_of_ours(text: bytes | None) -> None:
    assert ReleaseRecord.read(text) is None


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
    _, files = staged(tmp_path, {name: b"x"})
    assert set(files) == STAGED


@pytest.mark.parametrize("name", ["tokenizer.pkl", "tokenizer.bin", "tokenizer_state.pt", "NOTICE.bin"])
def test_a_pickle_is_left_behind_whatever_its_name(tmp_path: Path, name: str) -> None:
    _, files = staged(tmp_path, {name: b"\x80\x04."})
    assert set(files) == STAGED


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
    target, files = staged(tmp_path, {name: b"{}"})
    assert set(files) == STAGED | {name}
    assert (target / name).read_bytes() == b"{}"


def test_the_card_of_the_base_model_is_replaced_by_the_releases(tmp_path: Path) -> None:
    target, _ = staged(tmp_path, {"README.md": b"# Base model\n", "provenance.json": b"forged"})
    assert (target / "README.md").read_text() == CARD
    assert json.loads((target / "provenance.json").read_text()).items() >= PROVENANCE.items()


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
