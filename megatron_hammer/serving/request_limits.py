"""What a request may ask for: checks in front of llama.cpp, for what would end it or take all memory.

llama.cpp answers most wrong requests itself, with one clear error. Not these, which were tried on it: JSON that is
nested some ten thousand times ends the process, `repeat_last_n` of 2^31 allocates 8 GiB, the likeliest tokens of a
whole vocabulary at each step make an answer of gigabytes, 200,000 prompts or 50,000 sequence breakers in one request
hold up all others, and 20,000 messages take longer to render than a client waits. Of whole numbers it keeps 32 bits: a
limit of 2^32 + 5 tokens would be one of 5, and the token 2^32 the first one. What it does not know or cannot read of
stop texts and biases, it leaves out without an error, and an empty stop text ends every answer at once.
"""

import itertools
import re
from typing import Any

import orjson

from megatron_hammer.corpus.json_records import name_of_type

MOST_ENTRIES = 256
MOST_LIKELIEST = 100
# Fields that name a number of past tokens, for which llama.cpp allocates.
_PAST_TOKENS = ("repeat_last_n", "dry_penalty_last_n")
_LIKELIEST = ("n_probs", "top_logprobs", "logprobs")
_MOST_32_BITS = 2**31 - 1
_OF_ANY_SIZE = ("seed",)
_IDS = ("prompt", "input", "content", "tokens")
# Fields of OpenAI's API that llama.cpp does not have, and the values with which they change nothing.
_UNKNOWN = {"echo": False, "suffix": "", "best_of": 1, "functions": [], "function_call": "auto"}
_LISTS = ("prompt", "input", "content", "stop", "dry_sequence_breakers")


def check_request(body: bytes, *, context_tokens: int) -> bytes:
    """The body of a POST as JSON, written anew, so that llama.cpp parses what was checked. Raises ValueError.

    Every request that uses the model is an object.
    """
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"body: must be JSON in UTF-8, got: {error}. Check the request.") from None
    if not isinstance(request, dict):
        raise ValueError(f"body: must be a JSON object, got {name_of_type(request)}. Check the request.")
    _check_fields(request, context_tokens)
    _check_ignored(request)
    _check_biases(request.get("logit_bias"))
    try:
        return orjson.dumps(request)
    except orjson.JSONEncodeError:  # its limit is 254 levels
        raise ValueError("body: JSON must be nested less than 254 times, got more. Check the request.") from None


def _check_fields(request: dict[str, Any], context_tokens: int) -> None:
    most = dict.fromkeys(_PAST_TOKENS, context_tokens) | dict.fromkeys(_LIKELIEST, MOST_LIKELIEST)
    for name, limit in most.items():
        value = request.get(name)
        if isinstance(value, int | float) and value > limit:
            raise ValueError(f"{name}: must be at most {limit}, got {value}. Pass a smaller number.")
    for name, value in request.items():
        numbers = value if name in _IDS and isinstance(value, list) else [value]
        # Ids may lie a level deeper, as several prompts.
        for number in itertools.chain(*(one if isinstance(one, list) else [one] for one in numbers)):
            if isinstance(number, int | float) and abs(number) > _MOST_32_BITS and name not in _OF_ANY_SIZE:
                raise ValueError(f"{name}: must be at most {_MOST_32_BITS}, got {number}. Pass a smaller number.")
    # Every message has at least one token.
    for name, limit in (dict.fromkeys(_LISTS, MOST_ENTRIES) | {"messages": context_tokens}).items():
        value = request.get(name)
        # A list of ids is one prompt.
        if isinstance(value, list) and len(value) > limit and not all(type(item) is int for item in value):
            raise ValueError(f"{name}: must have at most {limit} entries, got {len(value)}. Send fewer in a request.")


def _check_ignored(request: dict[str, Any]) -> None:
    for name, harmless in _UNKNOWN.items():
        if request.get(name) not in (None, harmless):
            raise ValueError(f"{name}: is not supported by llama.cpp, got {str(request[name])[:60]}. Leave it out.")
    stops = request.get("stop")
    texts = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"stop: must be a text or a list of texts, none empty, got {str(stops)[:60]}. Correct it.")


def _check_biases(biases: Any) -> None:
    if biases is None:
        return
    if isinstance(biases, dict):
        biases = list(biases.items())
    for pair in biases if isinstance(biases, list) else [biases]:
        if not _is_bias(pair):
            raise ValueError(
                "logit_bias: must give tokens, each a text or an id of 32 bits, with a number or false, got "
                f"{str(pair)[:60]}. Correct it."
            )


def _is_bias(pair: Any) -> bool:
    if not isinstance(pair, list | tuple) or len(pair) != 2 or type(pair[0]) not in (int, str):
        return False
    # A text that is a number is an id.
    digits = re.fullmatch(r"\s*[+-]?0*([0-9]+)", str(pair[0]))
    is_id = digits is None or (len(digits[1]) <= 10 and int(digits[1]) <= _MOST_32_BITS)
    return is_id and (pair[1] is False or type(pair[1]) in (int, float))
