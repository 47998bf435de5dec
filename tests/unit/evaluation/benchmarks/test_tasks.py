from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.errors import ConfigError, DataError
from megatron_hammer.evaluation.benchmarks.offline import forbid_network

forbid_network()

from megatron_hammer.evaluation.benchmarks.tasks import USUAL_FOLDERS, load_tasks  # noqa: E402
from tests.helpers.published_benchmarks import NUM_QUESTIONS, write_published_data  # noqa: E402


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published_data(tmp_path_factory.mktemp("published"))


def load(names: list[str], data_dir: Path | None, **changes: Any) -> dict[str, Any]:
    options = {"tasks_dir": None, "num_fewshot": 0, "runs_code": False, **changes}
    return load_tasks(names, data_dir=data_dir, **options)


def test_a_task_without_its_examples_is_loaded_where_it_needs_none(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hellaswag"
    folder.mkdir()
    (folder / "val.jsonl").write_bytes((data_dir / "hellaswag" / "data" / "hellaswag_val.jsonl").read_bytes())
    assert len(load(["hellaswag"], tmp_path)["tasks"]["hellaswag"].eval_docs) == NUM_QUESTIONS
    with pytest.raises(DataError, match="must have split train of Rowan/hellaswag for task hellaswag"):
        load(["hellaswag"], tmp_path, num_fewshot=5)


def test_all_that_is_missing_is_named_at_once(data_dir: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(["ceval-ppl", "arc_easy"], data_dir)
    assert len(caught.value.problems) == 9
    assert "split val of ceval/ceval-exam computer_network for task ceval-ppl_computer_network" in str(caught.value)
    assert "43 more splits are missing" in str(caught.value)
    with pytest.raises(DataError, match="data-dir: must be given for baber/piqa"):
        load(["piqa"], None)


def test_code_of_the_model_is_run_only_with_leave() -> None:
    with pytest.raises(ConfigError, match=r"humaneval runs code that the model writes.*--run-generated-code"):
        load(["humaneval"], None)
    assert len(load(["humaneval"], None, runs_code=True, num_fewshot=5)["tasks"]["humaneval"].eval_docs) == 164


def test_task_files_of_the_user_come_first(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text('{"q": "a", "answer": "b"}\n')
    own = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files: {tmp_path}/questions.jsonl\ntest_split: train\n"
        "output_type: loglikelihood\ndoc_to_text: q\ndoc_to_target: answer\nmetric_list: [{metric: acc}]\n"
    )
    (tmp_path / "a.yaml").write_text(f"task: my_task\n{own}")
    (tmp_path / "b.yaml").write_text(f"task: piqa\n{own}")
    loaded = load(["my_task", "piqa"], data_dir, tasks_dir=tmp_path)
    assert {name: len(task.eval_docs) for name, task in loaded["tasks"].items()} == {"my_task": 1, "piqa": 1}
    with pytest.raises(ConfigError, match="tasks-dir: must be a folder"):
        load(["my_task"], data_dir, tasks_dir=tmp_path / "missing")


def test_names_are_checked(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A pattern that only our own names fit needs no other index.
    monkeypatch.setattr("megatron_hammer.evaluation.benchmarks.tasks.WHOLE_INDEX", None)
    assert list(load(["cmmlu-ppl_agro*"], data_dir)["tasks"]) == ["cmmlu-ppl_agronomy"]
    # lm-eval's whole index takes seconds; a part of it shows the same.
    monkeypatch.setattr("megatron_hammer.evaluation.benchmarks.tasks.WHOLE_INDEX", USUAL_FOLDERS)
    with pytest.raises(ConfigError, match=r"got helaswag. Did you mean hellaswag\?") as caught:
        load(["helaswag", "nothing"], data_dir)
    assert len(caught.value.problems) == 2
    loaded = load(["pi?a"], data_dir)
    assert list(loaded["tasks"]) == ["piqa"]
    with pytest.raises(ConfigError, match="max-new-tokens: is for tasks that generate, got 5 without one"):
        load(["piqa"], data_dir, max_new_tokens=5)
    (tmp_path / "group.yaml").write_text("group: mine\ntask: [piqa]\n")
    with pytest.raises(ConfigError, match="must name each task once"):
        load(["mine", "piqa"], data_dir, tasks_dir=tmp_path)


OWN_TASK = (
    "task: my_task\ndataset_path: json\ndataset_kwargs:\n  data_files: {folder}/questions.jsonl\n"
    "test_split: train\noutput_type: multiple_choice\ndoc_to_text: '{{{{q}}}}'\ndoc_to_choice: [x, y]\n"
    "doc_to_target: '{{{{answer}}}}'\nmetric_list: [{{metric: acc}}]\n"
)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("task: my_task", "task: [my_task\n  b: :", r"a.yaml: must be a task file, got ParserError"),
        ("task: my_task", "include: none.yaml\ntask: my_task", r"a.yaml: must be a task file, got FileNotFound"),
        ("test_split", "nonsense: 1\ntest_split", r"task my_task: lm-eval must load it, got TypeError.*nonsense"),
        ("'{{q}}'", "'{{q'", r"task my_task: lm-eval must load it, got TemplateSyntaxError"),
        ("'{{q}}'", "'{{other}}'", r"task my_task: lm-eval must load it, got UndefinedError: 'other' is undefined"),
        ("questions.jsonl", "none.jsonl", r"task my_task: lm-eval must load it, got FileNotFoundError"),
        ("[x, y]", "[x, y, z]", None),
        ("[x, y]", "[x]", r"task my_task: question 2 must fit the task, got ValueError: the answer '?y'?"),
    ],
)  # fmt: skip
def test_a_task_file_that_cannot_be_used_is_one_sentence(tmp_path: Path, old: str, new: str, message: str) -> None:
    (tmp_path / "questions.jsonl").write_text('{"q": "a", "answer": "x"}\n{"q": "b", "answer": "y"}\n')
    (tmp_path / "a.yaml").write_text(OWN_TASK.format(folder=tmp_path).replace(old, new))
    if message is None:
        assert len(load(["my_task"], None, tasks_dir=tmp_path)["tasks"]) == 1
        return
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        load(["my_task"], None, tasks_dir=tmp_path)
    assert "\n" not in str(caught.value)


def write_answers(folder: Path, *answers: str) -> Path:
    """C-Eval's law with these answers, the same for its examples."""
    for split in ("val", "dev"):
        path = folder / "ceval-exam" / split / f"law_{split}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("id,question,A,B,C,D,answer\n" + "".join(f"0,q,a,b,c,d,{answer}\n" for answer in answers))
    return folder


@pytest.mark.parametrize("style", ["ppl", "gen"])
def test_answers_have_one_spelling_and_what_is_no_option_is_named(tmp_path: Path, style: str) -> None:
    name = f"ceval-{style}_law"
    task = load([name], write_answers(tmp_path / "good", " A", "b "), num_fewshot=2)["tasks"][name]
    assert [task.doc_to_target(doc) for doc in task.eval_docs] == ([0, 1] if style == "ppl" else ["A", "B"])
    bad = write_answers(tmp_path / "bad", "A", "E", "")
    with pytest.raises(DataError, match=rf"task {name}: question 2 must fit the task, got ValueError: 'E'"):
        load([name], bad)
    assert load([name], bad, limit=1)
    with pytest.raises(DataError, match=r"num-fewshot: task .* has 3 examples, got num_fewshot=4"):
        load([name], bad, num_fewshot=4)
