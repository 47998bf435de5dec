"""What is refused before llama.cpp sees it; everything else reaches it with the same meaning."""

import json
from typing import Any

import pytest

from megatron_hammer.serving.request_limits import MOST_ENTRIES, MOST_LIKELIEST, check_request

CONTEXT = 77


def check(request: Any) -> Any:
    return json.loads(check_request(json.dumps(request).encode(), context_tokens=CONTEXT))


@pytest.mark.parametrize(
    "request_",
    [
        {"messages": [{"role": "user", "content": "春\u0000 \U0001f98a"}], "repeat_last_n": CONTEXT, "n": 2**31 - 1},
        {"prompt": list(range(MOST_ENTRIES + 1)), "logprobs": True, "top_logprobs": MOST_LIKELIEST},
        {"prompt": ["a"] * MOST_ENTRIES, "temperature": 1e-3, "seed": -1, "repeat_last_n": -1},
        {"prompt": [[1, 2], "a"], "seed": 2**63, "stream": True},
        {"messages": [{"role": 5}, "wrong"], "stop": ["a"] * MOST_ENTRIES},
        {"stop": "春", "logit_bias": {"5": -100, " 7": 1.5, "the": 1}, "echo": False, "best_of": 1, "suffix": None},
        {"stop": [], "logit_bias": [[5, False], ["the", 2]], "functions": []},
        {"messages": "wrong, and llama.cpp says so", "repeat_last_n": "five"},
    ],
)
def test_what_llama_cpp_can_judge_passes_unchanged(request_: Any) -> None:
    assert check(request_) == request_


@pytest.mark.parametrize("name", ["repeat_last_n", "dry_penalty_last_n"])
@pytest.mark.parametrize("value", [CONTEXT + 1, 1e30, 10**30])
def test_more_past_tokens_than_a_conversation_has(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name}: must be at most {CONTEXT}, got "):
        check({name: value})


@pytest.mark.parametrize(
    "fields",
    [{"max_tokens": 2**32 + 5}, {"top_k": -(2**31)}, {"n": 1e18}, {"prompt": [1, 2**32]}, {"prompt": [[2**32]]},
     {"tokens": [2**40]}],
)  # fmt: skip
def test_a_number_that_llama_cpp_would_cut_to_32_bits(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(ValueError, match=rf"^{name}: must be at most 2147483647, got -?\d+"):
        check(fields)


@pytest.mark.parametrize(
    "fields",
    [{"stop": ""}, {"stop": ["a", ""]}, {"stop": [None]}, {"stop": 5}, {"stop": {"a": 1}},
     {"logit_bias": "x"}, {"logit_bias": {"5": "x"}}, {"logit_bias": {"5": True}}, {"logit_bias": {str(2**32 + 5): 1}},
     {"logit_bias": [[2**32 + 5, 1]]}, {"logit_bias": [[5.5, 1]]}, {"logit_bias": [{"5": 1}]},
     {"logit_bias": {"9" * 9999: 1}}, {"echo": True}, {"suffix": "x"}, {"best_of": 2}, {"functions": [{"name": "f"}]}],
)  # fmt: skip
def test_what_llama_cpp_would_leave_out_or_cut(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(ValueError, match=rf"^{name}: (must|is not supported).* got "):
        check(fields)


@pytest.mark.parametrize(("body", "kind"), [(b"[1, 2]", "a list"), (b"null", "null"), (b"5", "a number")])
def test_a_body_that_is_no_object(body: bytes, kind: str) -> None:
    with pytest.raises(ValueError, match=f"^body: must be a JSON object, got {kind}"):
        check_request(body, context_tokens=CONTEXT)


@pytest.mark.parametrize("name", ["n_probs", "top_logprobs", "logprobs"])
def test_more_likeliest_tokens_than_an_answer_should_list(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: must be at most {MOST_LIKELIEST}, got {MOST_LIKELIEST + 1}"):
        check({name: MOST_LIKELIEST + 1})


@pytest.mark.parametrize("item", ["a", [1], True, {"prompt_string": "a"}])
def test_more_prompts_than_one_request_should_have(item: Any) -> None:
    with pytest.raises(ValueError, match=f"^prompt: must have at most {MOST_ENTRIES} entries, got 257"):
        check({"prompt": [item] * (MOST_ENTRIES + 1)})


def test_more_messages_than_a_conversation_has_tokens() -> None:
    with pytest.raises(ValueError, match=f"^messages: must have at most {CONTEXT} entries, got {CONTEXT + 1}"):
        check({"messages": [{"role": "user", "content": ""}] * (CONTEXT + 1)})


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"a": NaN}', b'"\\ud800"', b"[" * 2000 + b"]" * 2000])
def test_a_body_that_is_not_json(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"^body: must be JSON in UTF-8, got: "):
        check_request(body, context_tokens=CONTEXT)


def test_json_that_llama_cpp_would_recurse_into() -> None:
    with pytest.raises(ValueError, match=r"^body: JSON must be nested less than 254 times"):
        check_request(b'{"a":' + b"[" * 300 + b"]" * 300 + b"}", context_tokens=CONTEXT)
    body = b'{"a":' + b"[" * 200 + b"]" * 200 + b"}"
    assert check_request(body, context_tokens=CONTEXT) == body
