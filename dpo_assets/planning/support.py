"""The model support page: which families which engines compute, read from their descriptions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dpo_assets.planning.decoder import Decoder, Recurrent
from dpo_assets.planning.engines import UNSLOTH_FAMILIES, why_not
from dpo_assets.planning.families import FAMILIES, TEXT_OF, describe
from dpo_assets.planning.precision import NEEDED_CAPABILITY
from dpo_assets.planning.shape import Kernels

ENGINES: tuple[Kernels, ...] = ("fused", "transformers", "unsloth")  # `rows` computes everything.
YES, NO = "yes", "no"
SHARED = {
    "delta_net": "once; both answers start from the state of its delta nets",
    "short_conv": "once; both answers see its last tokens in the convolutions",
    "mamba": "once, but with each answer in Mamba",
}
COMPUTES: dict[Kernels, str] = {
    "fused": "this project's own layers with LoRA, on packed pairs",
    "transformers": "the model's own layers with PEFT, on packed pairs",
    "unsloth": f"Unsloth's own forward with a table of shared prefixes: {', '.join(UNSLOTH_FAMILIES)}",
    "rows": "the model's own forward on padded rows, each answer with its prompt",
}
PRECISIONS: dict[Kernels, str] = {
    "fused": "all",
    "transformers": "all",
    "unsloth": "all but `8bit`; `fp8` from compute capability 9.0 on",
    "rows": "all",
}
TESTS: dict[str, str] = {
    "descriptions": "dpo_assets_tests/planning/test_families.py::test_a_description_computes_what_its_model_does",
    "fused": "dpo_assets_tests/training/test_fused_families.py::test_a_family_equals_its_own_eager_forward",
    "transformers": "dpo_assets_tests/training/test_architectures.py"
    "::test_scores_loss_and_every_gradient_are_those_of_the_models_own_forward",
    "unsloth": "dpo_assets_tests/training/test_unsloth.py::test_unsloths_shared_prefix_attention_is_ours",
    "rows": "dpo_assets_tests/training/test_architectures.py"
    "::test_scores_loss_and_every_gradient_are_those_of_the_models_own_forward",
    "hybrids": "dpo_assets_tests/training/test_recurrent.py"
    "::test_a_hybrid_is_scored_and_differentiated_as_it_is_row_by_row",
}


@dataclass(frozen=True)
class Support:
    """What computes a family as its models are usually configured.

    Attributes:
        engines: `yes`, `no`, or the longest rows that each computes.
        prompt: how often a pair's prompt is computed by the fastest of them.
        reasons: why an engine does not, or not longer rows; of Unsloth nothing, whose families are listed.
    """

    family: str
    models: str
    engines: dict[Kernels, str]
    prompt: str
    reasons: tuple[str, ...]


def supported() -> Iterator[Support]:
    """Every family that there is a description of."""
    for family, row in FAMILIES.items():
        decoder = describe({"model_type": family, **row.usual})
        assert decoder is not None
        said = {kernels: why_not(kernels, decoder) for kernels in ENGINES}
        yield Support(
            family,
            row.models,
            {kernels: _how_long(kernels, decoder) for kernels in ENGINES},
            _prompt(decoder),
            tuple(_reasons({kernels: why for kernels, why in said.items() if why and kernels != "unsloth"})),
        )


def _reasons(said: dict[Kernels, str]) -> Iterator[str]:
    """Each reason once, with the engines that have it."""
    for why in dict.fromkeys(said.values()):
        yield f"{', '.join(kernels for kernels, other in said.items() if other == why)}: {why}"


def _how_long(kernels: Kernels, decoder: Decoder) -> str:
    """Up to which length an engine computes rows: a limit is a window, or where rotary tables begin to change."""
    if not why_not(kernels, decoder):
        return YES
    fixed = {attention.rope.fixed_up_to for attention in decoder.attentions if attention.rope}
    limits = sorted({*decoder.windows, *(length for length in fixed if length)}, reverse=True)
    longest = next((length for length in limits if not why_not(kernels, decoder, length)), 0)
    return f"up to {longest:,} tokens" if longest else NO


def _prompt(decoder: Decoder) -> str:
    if decoder.row_by_row:
        return "with each answer"
    kinds = dict.fromkeys(mixer.kind for mixer in decoder.mixers if isinstance(mixer, Recurrent))
    return "; ".join(SHARED[kind] for kind in kinds) or "once"


def markdown() -> str:
    """The page `docs/models.md`."""
    return "\n".join(_page()) + "\n"


def _page() -> Iterator[str]:
    yield "# Models"
    yield ""
    yield (
        "Written by `dpo-assets models --markdown` from the descriptions in `dpo_assets/planning/families/`. A new "
        "family is a row there and a tiny model in the tests."
    )
    yield ""
    yield (
        "Every causal language model that Transformers loads can be trained. What is described here runs on the "
        "engines that compute it; `hardware.kernels: auto` takes the fastest. What nothing describes is tried on "
        "`transformers`: its packed scores are compared with those of the model's own forward, and where they differ "
        "it runs on `rows`."
    )
    yield ""
    yield "## Engines"
    yield ""
    yield from _table(
        ("engine", "what it is", "precisions", "a pair's prompt", "tested by"),
        [
            (f"`{kernels}`", what, PRECISIONS[kernels], _shares(kernels), f"`{_short(TESTS[kernels])}`")
            for kernels, what in COMPUTES.items()
        ],
    )
    yield ""
    needed = ", ".join(f"`{name}` {major}.{minor}" for name, (major, minor) in NEEDED_CAPABILITY.items() if major)
    yield (
        f"Precisions need a card's compute capability: {needed}. Experts and routers are parameters and stay in 16 bit "
        f"in each. Descriptions are held against the logits of a tiny model: `{_short(TESTS['descriptions'])}`; layers "
        f"that carry a state against rows one by one: `{_short(TESTS['hybrids'])}`."
    )
    yield ""
    yield "## Families"
    yield ""
    yield (
        "As their models are usually configured; `rows` computes them all. `up to` is of the longest row, "
        f"`feedback.max_length`. Checkpoints with more than text ({', '.join(f'`{outer}`' for outer in TEXT_OF)}) are "
        "described by their text part."
    )
    yield ""
    yield from _table(
        ("model type", "models", *(f"`{kernels}`" for kernels in ENGINES), "a pair's prompt", "why not"),
        [(f"`{s.family}`", s.models, *s.engines.values(), s.prompt, "; ".join(s.reasons)) for s in supported()],
    )


def _shares(kernels: Kernels) -> str:
    return "with each answer" if kernels == "rows" else "once"


def _short(test: str) -> str:
    return test.rpartition("/")[2]


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'|'.join('---' for _ in head)}|"
    for row in rows:
        yield f"| {' | '.join(row)} |"
