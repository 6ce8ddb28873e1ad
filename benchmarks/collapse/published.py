"""Published configurations, read from CSV, as what the pipeline's own checks judge."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dpo_assets.checks.bands import Bands, Method
from dpo_assets.checks.catalog import CHECK_BY_NAME
from dpo_assets.checks.config import verdicts
from dpo_assets.checks.configuration import Configuration
from dpo_assets.checks.verdict import Level, Verdict, with_severity, worst

SHIPPED = Path(__file__).resolve().parent.parent / "data" / "collapse_cases.csv"
COLUMNS = ("model", "size_b", "method", "loss", "lr", "beta", "epochs", "effective_batch", "label", "source")
UNKNOWN = frozenset({"", "?", "-", "na", "n/a", "nan", "none", "null", "unknown"})  # Cells that say nothing.
REST = "more"  # Where cells behind the last column go.
# Other names of losses that have a band.
SAME_LOSS = {
    "dpo": "sigmoid", "rpo": "sigmoid+sft", "nll": "sft", "kto_pair": "kto", "cpo_simpo": "simpo", "rdpo": "robust",
    "slic": "hinge", "rso": "hinge", "exo": "exo_pair", "nca": "nca_pair", "bco": "bco_pair", "apo": "apo_zero",
    "sppo": "sppo_hard", "dpo_norm": "sigmoid_norm", "ln_dpo": "sigmoid_norm", "mpo": "sigmoid+bco_pair+sft",
    "aot_pair": "aot_unpaired",
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
    """The rows of a CSV with `COLUMNS`.

    A size, beta, epochs or batch that is not known (`UNKNOWN`) is not judged; of a size that is not known the widest
    band counts, and of a method the one that allows more.

    Raises:
        ValueError: with line and column, for a column that is missing or a cell that is no such value.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, restkey=REST, restval="")
        if missing := [name for name in COLUMNS if name not in (rows.fieldnames or ())]:
            raise ValueError(f"{path}: no column {', '.join(missing)}; a case needs {', '.join(COLUMNS)}")
        return [_case(Row(f"{path}:{rows.line_num}", row)) for row in rows]


@dataclass(frozen=True)
class Row:
    """A row of a case file, and where it stands."""

    place: str
    cells: dict[str, str]

    def text(self, column: str) -> str:
        return self.cells[column].strip()

    def number(self, column: str, least: float = 0.0) -> float:
        """A finite number above `least`."""
        text = self.text(column)
        try:
            value = float(text)
        except ValueError:
            raise self.fault(column, "is no number") from None
        if not (math.isfinite(value) and value > least):
            raise self.fault(column, f"is not a finite number above {least:g}")
        return value

    def number_or_unknown(self, column: str, least: float = 0.0) -> float | None:
        return None if self.unknown(column) else self.number(column, least)

    def unknown(self, column: str) -> bool:
        return self.text(column).lower() in UNKNOWN

    def fault(self, column: str, what: str) -> ValueError:
        return ValueError(f"{self.place}, column {column}: `{self.text(column)}` {what}")


def _case(row: Row) -> Case:
    if REST in row.cells:
        raise ValueError(f"{row.place}: more cells than columns; put quotes around a cell that holds a comma")
    label = row.text("label").lower()
    if label not in ("good", "bad"):
        raise row.fault("label", "is neither good nor bad")
    return Case(row.text("model"), _configuration(row), "good" if label == "good" else "bad", row.text("source"))


def _configuration(row: Row) -> Configuration:
    names = [SAME_LOSS.get(name, name) for name in row.text("loss").lower().replace(" ", "").split("+")]
    losses = tuple("+".join(names).split("+"))
    return Configuration(
        method=_method(row),
        billions=row.number_or_unknown("size_b"),
        losses=losses,
        learning_rate=row.number("lr"),
        beta=row.number_or_unknown("beta", least=-math.inf),
        epochs=row.number_or_unknown("epochs"),
        batch=row.number_or_unknown("effective_batch"),
        sft_weight=float("sft" in losses),
    )


def _method(row: Row) -> Method:
    """LoRA, QLoRA, DoRA and other adapters alike; all else trains the weights themselves."""
    name = row.text("method").lower()
    if row.unknown("method") or re.search("lora|dora|adapter|peft", name):
        return "lora"
    if re.search("full|fft|galore|lisa|badam|freeze", name):
        return "full"
    raise row.fault("method", "is neither full fine-tuning nor LoRA")


def judge(case: Case, bands: Bands) -> list[Verdict]:
    """The verdicts that the pipeline would show for a case, under the severities of the catalog."""
    return [with_severity(v, CHECK_BY_NAME[v.check].severity) for v in verdicts(case.configuration, bands)]


def level_of(case: Case, bands: Bands) -> Level:
    """What happens to a case: it passes, is warned of, or is blocked."""
    return worst(*(verdict.level for verdict in judge(case, bands)))
