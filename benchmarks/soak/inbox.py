"""A folder of feedback that changes as feedback does, and a ledger of what it holds, by which a dataset is judged.

The ledger knows rows and four rules, and nothing of the code that it judges: a row that is broken is in quarantine by
its file and line; equal pairs count once; two that prefer the other's rejected answer are both set aside; every other
pair is in the dataset.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

Pair = tuple[str, str, str]  # prompt, chosen, rejected
LONG_AGO = 1_700_000_000.0  # A file of that time is not being written.
LARGEST_FALL = 0.08  # Of all rows, in one change; the gate stands at 0.1.
PUT_TOGETHER = 12  # Files, from which on the oldest become one.
ANIMALS = ("cat", "dog", "bird", "frog", "bear", "fox", "hen", "cow", "duck", "fish")
PLACES = ("park", "house", "garden", "wood", "lake", "farm", "shop", "school", "hill", "beach")
DEEDS = ("played with a ball", "found a red box", "helped a friend", "made a cake", "sang a song", "saw a big tree")
NOISE = ("seven", "of", "the", "no", "and", "yes", "why", "it", "was", "not", "so", "up")


@dataclass(frozen=True)
class Row:
    """A line of a file. `pair` is None for one that nobody can read a preference from."""

    text: str
    pair: Pair | None

    @classmethod
    def of(cls, pair: Pair) -> Row:
        prompt, chosen, rejected = pair
        return cls(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}), pair)


@dataclass(frozen=True)
class Expected:
    """What a run that read the folder as it is now must come to. `red`: the check whose gate holds it."""

    rows: int
    accepted: frozenset[Pair]
    duplicates: int
    conflicts: int
    broken: frozenset[tuple[str, int]]  # Name of the file and number of the line.
    red: str


@dataclass
class Inbox:
    """The folder, and what lies in it.

    Args:
        folder: must exist and be empty.
        chance: decides on everything, so that equal seeds give equal files.
    """

    folder: Path
    chance: random.Random
    files: dict[str, list[Row]] = field(default_factory=dict)
    made: int = 0  # Prompts.
    named: int = 0  # Files.
    written: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    red: str = ""
    mend: Callable[[], object] | None = None  # Takes back what closed a gate.

    def begin(self, pairs: int) -> None:
        """The first file."""
        self._write(self._name("first"), self._some_fresh(pairs))

    def change(self) -> str:
        """Changes the folder in one of the ways in which feedback changes, and returns its name."""
        if self.mend is not None:
            self.mend()
            self.red, self.mend = "", None
            return self._done("mended")
        if len(self.files) >= PUT_TOGETHER:
            self._put_together()
            return self._done("put together")
        ways = {
            "new": (6, self._new),
            "late": (4, self._late),
            "duplicate": (4, self._duplicate),
            "withdrawn": (6, self._withdrawn),
            "flipped": (3, self._flipped),
            "broken": (4, self._broken),
            "renamed": (1, self._renamed),
            "unreadable": (1, self._unreadable),
            "lost": (1 if len(self.files) > 1 else 0, self._lost),  # Without a file there is nothing to ask for.
        }
        name = self.chance.choices(list(ways), [weight for weight, _ in ways.values()])[0]
        ways[name][1]()
        return self._done(name)

    def expected(self) -> Expected:
        """By the four rules."""
        rows = [row for file in self.files.values() for row in file]
        pairs = [row.pair for row in rows if row.pair is not None]
        different = frozenset(pairs)
        against = frozenset(pair for pair in different if (pair[0], pair[2], pair[1]) in different)
        broken = frozenset(
            (name, number)
            for name, file in self.files.items()
            for number, row in enumerate(file, start=1)
            if row.pair is None
        )
        return Expected(len(rows), different - against, len(pairs) - len(different), len(against), broken, self.red)

    # Ways to change

    def _new(self) -> None:
        self._write(self._name("new"), self._some_fresh(16))

    def _late(self) -> None:
        name = self.chance.choice(list(self.files))
        self._write(name, [*self.files[name], *self._some_fresh(16)])

    def _duplicate(self) -> None:
        self._write(self._name("duplicate"), [*self._some_sound(4), *self._some_fresh(14)])

    def _withdrawn(self) -> None:
        """People take their words back: single rows go, from several files; every file stays."""
        may_go = [(name, row) for name, file in self.files.items() for row in file[1:]]
        most = max(1, int(LARGEST_FALL * sum(map(len, self.files.values()))))
        for name, row in self.chance.sample(may_go, min(most, len(may_go))):
            self.files[name].remove(row)
        for name in self.files:
            self._write(name, self.files[name])

    def _flipped(self) -> None:
        turned = [Row.of((p, r, c)) for p, c, r in (row.pair for row in self._some_sound(2) if row.pair is not None)]
        self._write(self._name("flipped"), [*turned, *self._some_fresh(14)])

    def _broken(self) -> None:
        number = self.made
        kinds = (
            f'{{"prompt": "Cut off {number}", "chosen": "It was a',
            json.dumps({"prompt": f"No other answer {number}", "chosen": "Once upon a time."}),
            json.dumps({"prompt": f"No choice {number}", "chosen": "It was so.", "rejected": "It was so."}),
            json.dumps({"prompt": f"Nothing said {number}", "chosen": " ", "rejected": "It was so."}),
            json.dumps([number]),
        )
        rows = [*(Row(text, None) for text in self.chance.sample(kinds, 2)), *self._some_fresh(16)]
        self.chance.shuffle(rows)
        self._write(self._name("broken"), rows)

    def _renamed(self) -> None:
        old = self.chance.choice(list(self.files))
        rows = self._take_away(old)
        self._write(self._name("renamed"), rows)

    def _unreadable(self) -> None:
        """A file of which nothing is a preference."""
        name = self._name("unreadable")
        self._write(name, [Row(json.dumps({"of": "something", "else": n}), None) for n in range(5)])
        self.red, self.mend = "every_file_read", lambda: self._take_away(name)

    def _lost(self) -> None:
        """A whole file is gone; somebody puts it back."""
        name = max(self.files, key=lambda one: len(self.files[one]))
        rows = self._take_away(name)
        self.red, self.mend = "feedback_volume", lambda: self._write(name, rows)

    def _put_together(self) -> None:
        """The oldest files become one, as exports do."""
        oldest = list(self.files)[: PUT_TOGETHER // 2]
        rows = [row for name in oldest for row in self._take_away(name)]
        name = self._name("together")
        self._write(name, rows)
        self.files = {name: self.files.pop(name), **self.files}

    # Rows and files

    def _fresh(self) -> Row:
        """A pair of a new prompt; what people prefer is the sentence that is one."""
        self.made += 1
        animal, place, deed = (self.chance.choice(words) for words in (ANIMALS, PLACES, DEEDS))
        good = f"Once upon a time, there was a {animal}. The {animal} went to the {place} and {deed}."
        bad = " ".join(self.chance.choice(NOISE) for _ in range(self.chance.randint(8, 16)))
        return Row.of((f"Tell story {self.made} of a {animal} at the {place}.", good, f"{bad} {self.made}."))

    def _some_fresh(self, count: int) -> list[Row]:
        return [self._fresh() for _ in range(count)]

    def _some_sound(self, count: int) -> list[Row]:
        sound = [row for file in self.files.values() for row in file if row.pair is not None]
        return self.chance.sample(sound, min(count, len(sound)))

    def _name(self, kind: str) -> str:
        self.named += 1
        return f"{self.named:04d}-{kind}.jsonl"

    def _write(self, name: str, rows: list[Row]) -> None:
        self.files[name] = rows
        beside = self.folder.parent / f"{name}.beside"
        beside.write_text("".join(f"{row.text}\n" for row in rows), encoding="utf-8")
        self.written += 1
        os.utime(beside, (LONG_AGO + self.written, LONG_AGO + self.written))
        beside.rename(self.folder / name)

    def _take_away(self, name: str) -> list[Row]:
        (self.folder / name).unlink()
        return self.files.pop(name)

    def _done(self, name: str) -> str:
        self.kinds[name] += 1
        return name
