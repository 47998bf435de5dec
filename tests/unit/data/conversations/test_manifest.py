"""The template of a run is that of its conversations."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.data.conversations.manifest import find_template
from megatron_hammer.data.conversations.pair import ConversationWriter
from megatron_hammer.data.indexed.manifest import Manifest, encode_manifest, manifest_path
from megatron_hammer.errors import DataError
from tests.unit.data.conversations.test_pair import MANIFEST


def write(prefix: Path, name: str) -> str:
    template = dataclasses.replace(MANIFEST.template, name=name, sha256=name)
    with ConversationWriter(prefix, np.dtype("uint16")) as writer:
        writer.add(np.array([1, 2]), np.array([0, 1], np.uint8), [2])
        writer.finish()
        writer.publish(dataclasses.replace(MANIFEST, template=template))
    return str(prefix)


def test_the_template_of_a_run_is_found(tmp_path: Path) -> None:
    one, two, other = (write(tmp_path / prefix, name) for prefix, name in (("a", "x"), ("b", "x"), ("c", "y")))
    corpus = Manifest(**{field.name: getattr(MANIFEST, field.name) for field in dataclasses.fields(Manifest)})
    manifest_path(tmp_path / "corpus").write_bytes(encode_manifest(corpus))
    found = find_template(["0.3", one, "0.7", two, str(tmp_path / "corpus"), str(tmp_path / "gone")])
    assert found is not None
    assert found.name == "x"
    assert find_template([str(tmp_path / "corpus"), "1", str(tmp_path / "gone")]) is None
    with pytest.raises(DataError, match=r"must have one template, got several in .*a and .*c"):
        find_template([one, two, other])
