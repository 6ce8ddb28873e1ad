"""A dry run is a look: what it costs the decision that follows, and that nobody forgets it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dpo_assets.checks.evidence.candidate import REWARD
from dpo_assets.checks.evidence.ledger import Ledger
from dpo_assets.checks.evidence.outlook import Outlook
from dpo_assets.checks.evidence.paired import compare
from dpo_assets.checks.evidence.previews import Previews, PreviewsFile
from dpo_assets.checks.evidence.rules import Evidence, judge
from dpo_assets.checks.evidence.spending import share_of_look
from dpo_assets.errors import ConfigError
from dpo_assets_tests.checks.test_evidence_candidate import candidate, decided
from dpo_assets_tests.samples import scored_pairs

LEVEL = Ledger().budget().level
FRESH = frozenset(f"conversation {n}" for n in range(60))


def test_all_looks_together_have_the_level_of_one_test() -> None:
    shares = [share_of_look(look) for look in range(1, 1000)]
    assert shares == sorted(shares, reverse=True)
    assert 0.998 < sum(shares) < 1.0


def test_the_first_of_many_previewed_policies_that_passes_is_seldom_one_without_skill() -> None:
    """20 policies without skill on the same 300 conversations. As tests of their own, one passed in 1 of 3 cases."""
    rng, shared, alone = np.random.default_rng(1), 0, 0
    conversations = range(300)
    for _ in range(40):
        looks = [compare(rng.integers(0, 2, 300).tolist(), [0.5] * 300, conversations, draws=50) for _ in range(20)]
        shared += any(
            judge(Evidence({REWARD: one}, look=number), Ledger()).found for number, one in enumerate(looks, start=1)
        )
        alone += any(judge(Evidence({REWARD: one}), Ledger()).found for one in looks)
    assert alone >= 8
    assert shared <= 3


def test_looks_are_counted_by_challenger_and_conversations() -> None:
    before = Previews().and_one("m1", FRESH).and_one("m2", FRESH).and_one("m1", FRESH)
    assert len(before.looks) == 2
    assert [before.number(name, FRESH) for name in ("m1", "m2", "m3")] == [1, 2, 3]
    more = FRESH | {"a new conversation"}
    assert before.number("m1", more) == 3, "the same model on more is another look"
    assert before.number("m1", frozenset({"a new conversation"})) == 0, "what nobody looked at has its whole level"
    assert Previews().number("m1", FRESH) == 0


def test_a_decision_after_previews_has_what_they_left_of_the_level(tmp_path: Path) -> None:
    table = scored_pairs(0.7)  # p = 0.0013: enough for one test, and too little for the seventh look.
    alone = decided(Ledger(), candidate(tmp_path, table, "m7"))[1]
    assert (alone.decision, alone.level) == ("first_publication", LEVEL)
    previews = Previews()
    for number in range(1, 7):
        previews = previews.and_one(f"m{number}", FRESH)
    first = decided(Ledger(), candidate(tmp_path, table, "m1", previews=previews))[1]
    assert (first.decision, first.level) == ("first_publication", LEVEL / 2)
    seventh = candidate(tmp_path, table, "m7", previews=previews)
    line = decided(Ledger(), seventh)[1]
    assert (line.decision, line.level) == ("hold", pytest.approx(LEVEL / 56))
    assert "for look 7 with those of dry runs" in line.reason
    used, _ = decided(Ledger(), candidate(tmp_path, table))
    assert seventh.evidence(used).look == 0, "what a decision used up is no evidence any more, whoever looked at it"


def test_the_page_says_which_look_it_is_and_what_is_left_for_it() -> None:
    rows = dict(Outlook.of(Ledger(), 60, look=2).rows())
    assert rows["looks at these"] == "0.17 of the level is for this one, look 2; dry runs look"
    assert rows["level of the next test"] == f"{100 * LEVEL / 6:.3g} %, one-sided"
    assert "looks at these" not in dict(Outlook.of(Ledger(), 60).rows())
    assert Outlook.of(Ledger(), 50, look=10**8).can_pass is False


def test_looks_outlive_the_process_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    file = PreviewsFile.of(tmp_path)
    assert file.read() == Previews()
    seen = file.add("m1", FRESH)
    assert file.add("m1", FRESH) == seen == PreviewsFile.of(tmp_path).read()
    assert file.add("m2", FRESH).number("m3", FRESH) == 3
    assert {path.name for path in file.path.parent.iterdir()} <= {"previews.json", "previews.json.lock"}
    file.path.write_bytes(file.path.read_bytes()[:-9])
    for use in (file.read, lambda: file.add("m3", FRESH)):
        with pytest.raises(ConfigError, match=r"previews\.json cannot be read; put it back from a backup"):
            use()
