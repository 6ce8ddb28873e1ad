"""Published configurations, read from CSV, as what the pipeline's own checks judge."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dpo_assets.checks.bands import Bands
from dpo_assets.checks.catalog import CHECK_BY_NAME
from dpo_assets.checks.config import verdicts
from dpo_assets.checks.configuration import Configuration
from dpo_assets.checks.verdict import Level, Verdict, with_severity, worst

SHIPPED = Path(__file__).resolve().parent.parent / "data" / "collapse_cases.csv"
COLUMNS = ("model", "size_b", "method", "loss", "lr", "beta", "epochs", "effective_batch", "label", "source")
# Other names of losses that have a band.
SAME_LOSS = {
    "dpo": "sigmoid", "rpo": "sigmoid+sft", "nll": "sft", "kto_pair": "kto", "cpo_simpo": "simpo", "rdpo": "robust",
    "slic": "hinge", "rso": "hinge", "exo": "exo_pair", "nca": "nca_pair", "bco": "bco_pair", "apo": "apo_zero",
    "sppo": "sppo_hard", "dpo_norm": "sigmoid_norm",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One published run. `project`: whose it is, so that rows of one author count once."""

    model: str
    configuration: Configuration
    label: Literal["good", "bad"]
    source: str

    @property
    def project(self) -> str:
        return project_of(self.source)


def project_of(source: str) -> str:
    """The repository, paper or model card that a source names.

    >>> project_of("hiyouga/LlamaFactory issue #7734"), project_of("arXiv:2410.08847 sec 6")
    ('hiyouga/llamafactory', 'arxiv:2410.08847')
    """
    text = re.sub(r"https?://(www\.)?(github\.com|huggingface\.co|hf\.co)/", "", source)
    paper = re.search(r"arxiv\D{0,20}(\d{4}\.\d{4,5})", text, re.IGNORECASE)
    repository = re.search(r"[\w.-]+/[\w.-]+", text)
    if paper and (repository is None or paper.start() <= repository.start()):
        return f"arxiv:{paper[1]}"
    found = repository[0] if repository else text.split(" (")[0]
    # One project under two spellings of its name.
    return found.lower().replace("llama-factory", "llamafactory")


def read_cases(path: Path) -> list[Case]:
    """The rows of a CSV with `COLUMNS`. An empty beta, epochs or batch is not known, and not judged.

    Raises:
        ValueError: with the line, for a column that is missing or a value that is none.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        if missing := [name for name in COLUMNS if name not in (rows.fieldnames or ())]:
            raise ValueError(f"{path}: no column {', '.join(missing)}; a case needs {', '.join(COLUMNS)}")
        return list(_cases(path, rows))


def _cases(path: Path, rows: csv.DictReader[str]) -> Iterator[Case]:
    for row in rows:
        label = row["label"].strip()
        try:
            if label not in ("good", "bad"):
                raise ValueError(f"label `{label}` is neither good nor bad")
            yield Case(row["model"], _configuration(row), "good" if label == "good" else "bad", row["source"])
        except ValueError as error:
            raise ValueError(f"{path}:{rows.line_num}: {error}") from None


def _configuration(row: dict[str, str]) -> Configuration:
    names = [SAME_LOSS.get(name, name) for name in row["loss"].strip().lower().replace(" ", "").split("+")]
    losses = tuple("+".join(names).split("+"))
    method = row["method"].strip().lower()

    def maybe(column: str) -> float | None:
        return float(row[column]) if row[column].strip() else None

    return Configuration(
        method="full" if method.startswith("full") else "lora",  # LoRA, QLoRA and DoRA alike.
        billions=float(row["size_b"]),
        losses=losses,
        learning_rate=float(row["lr"]),
        beta=maybe("beta"),
        epochs=maybe("epochs"),
        batch=maybe("effective_batch"),
        sft_weight=float("sft" in losses),
    )


def judge(case: Case, bands: Bands) -> list[Verdict]:
    """The verdicts that the pipeline would show for a case, under the severities of the catalog."""
    return [with_severity(v, CHECK_BY_NAME[v.check].severity) for v in verdicts(case.configuration, bands)]


def level_of(case: Case, bands: Bands) -> Level:
    """What happens to a case: it passes, is warned of, or is blocked."""
    return worst(*(verdict.level for verdict in judge(case, bands)))
