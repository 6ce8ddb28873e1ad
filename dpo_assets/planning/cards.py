"""GPUs by the names people use, so that a plan can be asked for without having the card.

Memory is what CUDA reports as the total, which is what a run can plan with: less than the figure on the box by what
firmware and error correction take (T4 14.56, RTX 4090 23.5 to 23.7, RTX 5090 31.37, A100 39.4 and 79.2, L40S 44.4,
H100 79.1 GiB in out-of-memory messages of such cards). Capabilities are NVIDIA's. So are the rates, of its data sheets
and architecture white papers: dense matrix products in bf16 (fp16 before Ampere) that add up in fp32, which GeForce
cards do at half the rate of their data centre kin, and the bandwidth of the memory.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, replace
from typing import get_args

from dpo_assets.errors import ConfigError
from dpo_assets.machine import in_steps, memory_bytes
from dpo_assets.planning.precision import Device, Precision

CPU = "cpu"


@dataclass(frozen=True)
class Card:
    """One model of GPU.

    Attributes:
        key: the name it is asked by.
        memory_gib: memory that CUDA reports, in GiB.
        tflops: dense 16-bit matrix products, in 10^12 operations a second.
        terabytes_per_s: bandwidth of its memory, in 10^12 bytes a second.
    """

    key: str
    name: str
    memory_gib: float
    capability: tuple[int, int]
    tflops: float
    terabytes_per_s: float

    def device(self) -> Device:
        return Device("cuda", self.name, self.memory_gib, self.capability)

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Precisions that it can train in."""
        return tuple(p for p in get_args(Precision) if self.device().supports(p))


CARDS: tuple[Card, ...] = (
    Card("v100-16", "Tesla V100 16 GB", 15.7, (7, 0), 125, 0.9),
    Card("v100-32", "Tesla V100 32 GB", 31.7, (7, 0), 125, 0.9),
    Card("t4", "Tesla T4", 14.5, (7, 5), 65, 0.32),
    Card("rtx2080ti", "GeForce RTX 2080 Ti", 10.7, (7, 5), 53.8, 0.616),
    Card("a100-40", "A100 40 GB", 39.4, (8, 0), 312, 1.555),
    Card("a100-80", "A100 80 GB", 79.2, (8, 0), 312, 2.039),
    Card("a10g", "A10G", 22.0, (8, 6), 70, 0.6),
    Card("a6000", "RTX A6000", 47.4, (8, 6), 154.8, 0.768),
    Card("rtx3060", "GeForce RTX 3060 12 GB", 11.7, (8, 6), 25.5, 0.36),
    Card("rtx3090", "GeForce RTX 3090", 23.6, (8, 6), 71, 0.936),
    Card("l4", "L4", 22.0, (8, 9), 121, 0.3),
    Card("l40s", "L40S", 44.4, (8, 9), 362, 0.864),
    Card("rtx4070", "GeForce RTX 4070", 11.7, (8, 9), 58.3, 0.504),
    Card("rtx4070ti", "GeForce RTX 4070 Ti", 11.7, (8, 9), 80.2, 0.504),
    Card("rtx4070tisuper", "GeForce RTX 4070 Ti SUPER", 15.6, (8, 9), 88.2, 0.672),
    Card("rtx4080", "GeForce RTX 4080", 15.6, (8, 9), 97.5, 0.717),
    Card("rtx4080super", "GeForce RTX 4080 SUPER", 15.6, (8, 9), 104.4, 0.736),
    Card("rtx4090", "GeForce RTX 4090", 23.5, (8, 9), 165.2, 1.008),
    Card("rtx6000ada", "RTX 6000 Ada", 47.4, (8, 9), 364.2, 0.96),
    Card("h100", "H100 80 GB", 79.1, (9, 0), 989, 3.35),
    Card("h100-pcie", "H100 PCIe 80 GB", 79.1, (9, 0), 756, 2.0),
    Card("h100-nvl", "H100 NVL 94 GB", 93.0, (9, 0), 835, 3.9),
    Card("gh200", "GH200 96 GB", 94.5, (9, 0), 990, 4.0),
    Card("h200", "H200", 139.7, (9, 0), 989, 4.8),
    Card("b200", "B200", 178.3, (10, 0), 2250, 8.0),
    Card("rtx5080", "GeForce RTX 5080", 15.4, (12, 0), 112.6, 0.96),
    Card("rtx5090", "GeForce RTX 5090", 31.3, (12, 0), 209.5, 1.792),
    Card("rtxpro6000", "RTX PRO 6000 Blackwell", 94.9, (12, 0), 503.8, 1.792),
)
_BY_NAME = {re.sub(r"[^a-z0-9]", "", card.key): card for card in CARDS}
# Words that people and drivers put around the name.
_DECORATION = re.compile(r"nvidia|geforce|tesla|sxm\d?|hbm\d?e?|gib|gb(?!\d)|[^a-z0-9]")
_SLICE = re.compile(r"\bmig \d+[cg][\w.]*?\.(\d+)gb")  # Of a name such as `NVIDIA H100 80GB HBM3 MIG 1g.10gb`.
_MOBILE = re.compile(r"laptop|mobile|with max-q")
_OTHER_CARD = re.compile(r"(ti)?(super)?$")  # Behind a name: of a card with other rates.
# Of the desktop's rates: an RTX 4090 Laptop has 9,728 of 16,384 cores, at lower clocks, and 576 of 1,008 GB/s.
MOBILE_SHARE = 0.5


def find_card(name: str) -> Card:
    """The card of a name such as `rtx4090`, `RTX 4090`, `4090` or `NVIDIA A100-SXM4-80GB`.

    Raises:
        ConfigError: for a name that more than one card answers to, or none; both list what would do.
    """
    names = _without_decoration(name)
    plain = names[-1]
    for written in names:
        if found := _BY_NAME.get(written) or _BY_NAME.get(f"rtx{written}") or _BY_NAME.get(written.removeprefix("rtx")):
            return found
    sizes = [card.key for card in CARDS if card.key.partition("-")[0] == plain]
    if sizes:
        raise ConfigError(f"`{name}` comes in more than one size; say which: {' or '.join(f'`{k}`' for k in sizes)}.")
    begun = [k for k in _BY_NAME if f"rtx{plain}".startswith(k) or plain.startswith(k)]
    near = list(dict.fromkeys([*begun, *difflib.get_close_matches(plain, _BY_NAME, n=3, cutoff=0.6)]))
    hint = f"did you mean {' or '.join(f'`{_BY_NAME[k].key}`' for k in near)}? " if near else ""
    known = ", ".join(card.key for card in CARDS)
    raise ConfigError(f"there is no card `{name}` in the catalogue; {hint}Known: {CPU}, {known}.")


def _without_decoration(name: str) -> tuple[str, ...]:
    """A name without what stands around it, with the form of its board (PCIe) and without that."""
    plain = _DECORATION.sub("", name.lower())
    return plain, plain.replace("pcie", "")


@dataclass(frozen=True)
class Rates:
    """Whose rates a device is predicted by, and what must be said of that; nothing where they are its own."""

    card: Card
    note: str = ""


def rates_of(device: Device) -> Rates | None:
    """The rates of a device by the name its driver tells; None for a card that is not in the catalogue.

    Of one card in several sizes they are those of the nearest memory. A slice of a GPU (MIG) has the share that its
    memory is of the whole.
    """
    name = device.name.lower()
    part, mobile = _SLICE.search(name), _MOBILE.search(name)
    whole = _SLICE.sub("", _MOBILE.split(name)[0] if mobile else name)
    stated = re.search(r"(\d+) ?gi?b", whole)
    # A slice tells its own memory: of a card in several sizes it may be of the largest.
    memory = float(stated[1]) if stated else math.inf if part else device.memory_gib
    memory = min(memory, max(card.memory_gib for card in CARDS))
    written = {form for plain in _without_decoration(re.sub(r"\d+ ?gi?b", "", whole)) for form in _series(plain)}
    found = [(card, rest) for card in CARDS for form in written if (rest := _behind(form, card)) is not None]
    if not found:
        return None
    longest = max(len(_plain(card)) for card, _ in found)
    card, rest = min(
        (pair for pair in found if len(_plain(pair[0])) == longest),
        key=lambda pair: (abs(pair[0].memory_gib - memory), pair[1]),
    )
    if part is not None:
        share = min(1.0, int(part[1]) / card.memory_gib)
        return Rates(_scaled(card, share), f"at {share:.0%} of the rates of {_a(card)}")
    if mobile is not None:
        return Rates(_scaled(card, MOBILE_SHARE), f"at {MOBILE_SHARE:.0%} of the rates of {_a(card)}")
    other = rest and _OTHER_CARD.fullmatch(rest)
    return Rates(card, f"at the rates of {_a(card)}" if other else "")


def _a(card: Card) -> str:
    return f"{'an' if card.name[0] in 'AHLR' else 'a'} {card.name}"


def _scaled(card: Card, share: float) -> Card:
    return replace(card, tflops=share * card.tflops, terabytes_per_s=share * card.terabytes_per_s)


def _series(plain: str) -> tuple[str, str]:
    """A name with and without the series that people leave out."""
    return plain, plain.removeprefix("rtx")


def _behind(name: str, card: Card) -> str | None:
    """What stands behind the card's name in a name without decoration; None where it does not begin with it."""
    found = re.match(rf"{_plain(card)}(?!\d)", name)
    return None if found is None else name[found.end() :]


def _plain(card: Card) -> str:
    """Its key without the size of its memory."""
    return re.sub(r"-\d+$|[^a-z0-9-]", "", card.key).replace("-", "")


def this_cpu() -> Device:
    """This machine's CPU with all the memory that this process may use of it.

    What is free changes by the second, and plans must repeat.
    """
    return Device("cpu", "CPU", in_steps(memory_bytes()))


def device_of(name: str) -> tuple[str, Device]:
    """Catalogue key and device of a name; `cpu` is this machine's.

    Raises:
        ConfigError: for a name that is not in the catalogue.
    """
    if name.strip().lower() == CPU:
        return CPU, this_cpu()
    card = find_card(name)
    return card.key, card.device()
