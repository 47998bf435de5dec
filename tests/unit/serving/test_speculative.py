"""Draft models: vocabularies are compared token by token, and the arithmetic of the gain agrees with a simulation."""

from pathlib import Path

import pytest

from megatron_hammer.errors import ConfigError
from megatron_hammer.serving.speculative import (
    DraftOptions,
    build_draft_parameters,
    compute_break_even_cost,
    estimate_speedup,
)
from tests.helpers.gguf_models import VOCABULARY, VOCABULARY_TYPES, write_vocabulary
from tests.helpers.messages import assert_problems, raises_problem

TOKENS, TYPES = VOCABULARY, VOCABULARY_TYPES


def build(folder: Path, *, context_tokens: int = 128, num_tokens: int = 4, **changes: object) -> dict[str, object]:
    target = write_vocabulary(folder / "target.gguf")
    draft = write_vocabulary(folder / "draft.gguf", **changes)
    options = DraftOptions(path=draft, num_tokens=num_tokens)
    return build_draft_parameters(target, options, context_tokens=context_tokens, num_threads=3)


def test_the_same_vocabulary_passes(tmp_path) -> None:
    parameters = build(tmp_path, num_tokens=7)
    assert parameters["speculative.draft.mparams.path"] == str(tmp_path / "draft.gguf")
    assert parameters["speculative.draft.n_max"] == 7
    assert parameters["speculative.draft.cpuparams.n_threads"] == 3
    assert parameters["speculative.types"] == ["COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE"]


def test_every_parameter_is_one_of_llama_cpp() -> None:
    """A name that xllamacpp does not have would be an error only when a server starts."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    draft = parameters.speculative.draft
    assert hasattr(xllamacpp.common_speculative_type, "COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE")
    assert all(hasattr(draft, name) for name in ("mparams", "n_max", "cpuparams", "cpuparams_batch"))


def test_rows_that_pad_the_embedding_may_differ_in_number(tmp_path) -> None:
    build(tmp_path, tokens=(*TOKENS, "[PAD6]", "[PAD7]"), types=(*TYPES, 5, 5))


CASES = {
    "another token": (
        {"tokens": (*TOKENS[:3], "b", "夏", TOKENS[5])},
        [("draft-model: token 3 must be 'a'", "got 'b'", "first of 2")],
    ),
    "tokens in another order": (
        {"tokens": (*TOKENS[:3], "春", "a", TOKENS[5])},
        [("draft-model: token 3 must be 'a'", "got '春'", "first of 2")],
    ),
    "an added token that only the draft has": (
        {"tokens": (*TOKENS, "<tool>"), "types": (*TYPES, 4)},
        [
            (
                "draft-model: both must have the same tokens",
                "6 in the target",
                "7 in the draft",
                "token 6, '<tool>'",
                "in the draft",
            )
        ],
    ),
    "an added token that only the target has": (
        {"tokens": TOKENS[:5], "types": TYPES[:5]},
        [
            (
                "draft-model: both must have the same tokens",
                "5 in the draft",
                "token 5, '<|im_end|>'",
                "only in the target",
            )
        ],
    ),
    "a special token that is text in the draft": (
        {"types": (*TYPES[:5], 1)},
        [("draft-model: token 5, '<|im_end|>'", "user-defined", "got normal")],
    ),
    "another end of a text": (
        {"eos_token_id": 5},
        [("draft-model: eos_token_id must be 2", "got 5")],
    ),
    "a token put before every text": (
        {"add_bos_token": True},
        [("draft-model: add_bos_token must be None", "got True")],
    ),
}


@pytest.mark.parametrize("changes, expected", CASES.values(), ids=CASES)
def test_the_first_difference_is_named(tmp_path, changes, expected) -> None:
    with pytest.raises(ConfigError) as error:
        build(tmp_path, **changes)
    assert_problems(error.value.problems, *((str(tmp_path / "draft.gguf"), *facts) for facts in expected))


def test_a_draft_with_fewer_positions_is_refused(tmp_path) -> None:
    with raises_problem(ConfigError, str(tmp_path / "draft.gguf"), "128 tokens", "got 64", "--context 64"):
        build(tmp_path, context=64)
    build(tmp_path, context=64, context_tokens=64)


def test_no_draft_tokens_are_refused(tmp_path) -> None:
    with raises_problem(ConfigError, "draft-tokens", "got 0"):
        build(tmp_path, num_tokens=0)


def test_at_the_break_even_nothing_is_gained() -> None:
    cost = compute_break_even_cost(2.5, 4, verification_cost=1.2)
    assert estimate_speedup(2.5, 4, draft_cost=cost, verification_cost=1.2) == pytest.approx(1)
    assert estimate_speedup(2.5, 4, draft_cost=cost / 2, verification_cost=1.2) > 1
    # Where a pass over all proposed tokens costs more than the tokens that it gives, no draft is cheap enough.
    assert compute_break_even_cost(2.5, 4, verification_cost=3.0) < 0
