import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.data.indexed.pair import read_index
from megatron_hammer.data.order import identity as order_identity
from megatron_hammer.data.order.identity import count_source, identify_source, is_same_data
from tests.helpers.sample_orders import write_numbered


def test_a_copy_is_the_same_and_a_changed_token_is_not(tmp_path: Path) -> None:
    first = write_numbered(tmp_path / "a", [30, 40, 50])
    copy = write_numbered(tmp_path / "b", [30, 40, 50])
    identity, of_copy = (identify_source(prefix, read_index(prefix)) for prefix in (first, copy))
    assert identity == of_copy
    assert is_same_data(identity, of_copy) is True
    tokens = np.memmap(f"{copy}.bin", dtype=np.int32, mode="r+")
    tokens[60] += 1
    tokens.flush()
    assert is_same_data(identity, identify_source(copy, read_index(copy))) is False
    other = write_numbered(tmp_path / "c", [40, 30, 50])
    assert is_same_data(identity, identify_source(other, read_index(other))) is False


def test_headers_alone_can_only_prove_a_difference(tmp_path: Path) -> None:
    index = read_index(write_numbered(tmp_path / "a", [30, 40, 50]))
    known = identify_source(str(tmp_path / "a"), index)
    assert is_same_data(known, count_source(index)) is None
    assert is_same_data(known, replace(count_source(index), num_documents=4)) is False


def test_the_hashes_of_a_manifest_count(tmp_path: Path) -> None:
    prefix = write_numbered(tmp_path / "a", [30, 40, 50])
    Path(f"{prefix}.manifest.json").write_text(json.dumps({"format_version": 1}))
    assert identify_source(prefix, read_index(prefix)).bin_sha256 is None  # no manifest, which preflight says
    known = identify_source(prefix, read_index(prefix))
    assert is_same_data(replace(known, bin_sha256="1"), replace(known, bin_sha256="2")) is False
    assert is_same_data(replace(known, bin_sha256="1"), known) is True


def test_a_large_file_is_hashed_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_identity, "BLOCK_BYTES", 16)
    monkeypatch.setattr(order_identity, "NUM_BLOCKS", 3)
    path = tmp_path / "file"
    hashes = []
    for changed in (None, 0, 999, 500, 100):  # begin, end, middle, and a byte between the blocks
        content = bytearray(1000)
        if changed is not None:
            content[changed] = 1
        path.write_bytes(content)
        hashes.append(order_identity.hash_blocks(path, 1000, len(hashes)))
    assert len(set(hashes[:4])) == 4
    assert hashes[4] == hashes[0]
    path.write_bytes(bytes(1001))
    assert order_identity.hash_blocks(path, 1001, 9) != hashes[0]
