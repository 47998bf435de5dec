"""The pods of examples/kubernetes/ started as a kubelet starts them; Python is a stand-in that notes its arguments."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.parsed_flags import find
from tests.helpers.repository import ROOT

pytestmark = pytest.mark.integration

# name: (host of node 0, what the log's folder is called)
MANIFESTS = {
    "indexed-job": ("hammer-1b4-0.hammer-1b4", "logs/node-1"),
    "jobset": ("hammer-1b4-node-0-0.hammer-1b4", "logs/attempt-3/node-1"),
    "trainjob": ("hammer-1b4-node-0-0.hammer-1b4", "logs/attempt-3/node-1"),
}
# What the controllers write on the second pod after three restarts.
FIELDS = {
    "metadata.annotations['batch.kubernetes.io/job-completion-index']": "1",
    "metadata.labels['jobset.sigs.k8s.io/restart-attempt']": "3",
}
PYTHON = '#!/usr/bin/env bash\nprintf "%s\\0" "$@" >"$WORDS"\n'


def read_objects(name: str) -> dict[str, dict[str, Any]]:
    text = (ROOT / "examples" / "kubernetes" / f"{name}.yaml").read_text()
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def find_pods(value: Any) -> list[dict[str, Any]]:
    """Every pod specification in an object."""
    if isinstance(value, list):
        return [pod for item in value for pod in find_pods(item)]
    if not isinstance(value, dict):
        return []
    return [value] if "containers" in value else [pod for item in value.values() for pod in find_pods(item)]


def expand_environment(entries: list[dict[str, Any]]) -> dict[str, str]:
    """$(NAME) becomes the value of a variable that stands before it, and otherwise stays."""
    variables: dict[str, str] = {}
    for entry in entries:
        value = entry["value"] if "value" in entry else FIELDS[entry["valueFrom"]["fieldRef"]["fieldPath"]]
        variables[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda match: variables.get(match[1], match[0]), value)
    return variables


def start_pod(name: str, tmp_path: Path, **more: str) -> list[str]:
    """What the only container of a pod hands to Python, with the script and the variables of the manifest."""
    objects = read_objects(name)
    (pod,) = find_pods(list(objects.values()))
    (container,) = pod["containers"]
    assert container["command"] == ["bash", "/launch/launch.sh"]
    script, words = tmp_path / "launch.sh", tmp_path / "words"
    script.write_text(objects["ConfigMap"]["data"]["launch.sh"])
    (tmp_path / "python3").write_text(PYTHON)
    (tmp_path / "python3").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "WORDS": str(words)}
    environment |= expand_environment(container["env"]) | more
    result = subprocess.run(
        ["bash", str(script), *container["args"]], env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return words.read_text().split("\0")[:-1]


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_pod_is_a_node(name: str, tmp_path: Path) -> None:
    master, log_dir = MANIFESTS[name]
    words = start_pod(name, tmp_path, DATA_PATH="/data/corpus_text_document")
    split = words.index("--")
    assert words[:split] == [
        *("-m", "megatron_hammer.training.launch", "--nproc-per-node", "8", "--max-restarts", "100"),
        *("--nnodes", "2", "--node-rank", "1"),
        *("--master-addr", master, "--master-port", "29500"),
        *("--log-dir", f"/workspace/outputs/hammer-1b4/{log_dir}", "--tee", "3"),
    ]
    assert words[-4:] == ["--save", "/workspace/outputs/hammer-1b4", "--data-path", "/data/corpus_text_document"]


@pytest.mark.parametrize("name", ["NODE_RANK", "MASTER_ADDR"])
def test_a_node_that_does_not_know_its_place(name: str, tmp_path: Path) -> None:
    """Exit code 2: nothing would be better after a restart."""
    with pytest.raises(AssertionError, match=rf"error: {name}: must be the .*, got none for NNODES=2\."):
        start_pod("jobset", tmp_path, **{name: ""})


def test_the_dry_run_accepts_the_examples(tmp_path: Path) -> None:
    words = start_pod("jobset", tmp_path, DRY_RUN="1")
    assert words[-3:] == ["--dry-run", "--world-size", "16"]
    assert find(*words[2 : words.index("--save")], "--mock-data", *words[-3:], platform="cuda") == []
