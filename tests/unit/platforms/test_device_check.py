"""Memory that keeps what is written, memory that does not, and the speed of products; on the CPU."""

import pytest
import torch

from megatron_hammer.platforms import device_check
from megatron_hammer.platforms.device_check import count_wrong_words, find_wrong_words, time_products, write_pattern

CPU = torch.device("cpu")
NUM_BYTES = 3 * (1 << 20) + 16


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_check, "CHUNK_BYTES", 1 << 20)


def test_good_memory_has_no_wrong_word() -> None:
    assert find_wrong_words(CPU, NUM_BYTES) == 0


@pytest.mark.parametrize("is_inverted", [False, True])
def test_one_flipped_bit_is_noticed(is_inverted: bool) -> None:
    chunks = write_pattern(CPU, NUM_BYTES, is_inverted=is_inverted)
    assert sum(chunk.numel() for chunk in chunks) == NUM_BYTES // 8
    assert count_wrong_words(chunks, is_inverted=is_inverted) == 0
    chunks[-1][1] ^= 1 << 40
    chunks[0][7] ^= 1
    assert count_wrong_words(chunks, is_inverted=is_inverted) == 2


def test_chunks_that_changed_places_are_noticed() -> None:
    """As where two addresses lead to the same memory."""
    chunks = write_pattern(CPU, NUM_BYTES)
    assert count_wrong_words([chunks[1], chunks[0], *chunks[2:]]) == chunks[0].numel() + chunks[1].numel()


def test_products_have_a_speed() -> None:
    assert time_products(CPU, torch.float32, [(8, 16, 24), (8, 24, 16)]) > 0


def test_the_memory_of_the_machine_is_read() -> None:
    free_bytes, total_bytes = device_check.read_memory_bytes(CPU)
    assert 0 < free_bytes <= total_bytes
    assert device_check.read_uuid(CPU) is None
