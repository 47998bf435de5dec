import pytest

from tests.helpers.parsed_flags import TINY, find, plan


@pytest.mark.parametrize(("instances", "num_problems"), [(1, 0), (2, 0), (3, 1), (16, 1)])
def test_instances_of_the_optimizer_divide_the_ranks_that_hold_the_same_weights(
    instances: int, num_problems: int
) -> None:
    flags = (*TINY, *plan(8), "--num-distributed-optimizer-instances", str(instances))
    problems = find(*flags, "--global-batch-size", "16", platform="cuda")
    assert len(problems) == num_problems
    if problems:
        assert "num-distributed-optimizer-instances: must divide the 8 ranks" in problems[0]
        assert f"got num_distributed_optimizer_instances={instances}." in problems[0]
        assert "Use 1, 2, 4 or 8." in problems[0]


def test_instances_of_the_optimizer_divide_the_ranks_that_hold_the_same_experts() -> None:
    """Megatron splits those ranks into as many instances, and would end with an assertion."""
    flags = ("--preset", "hammer-tiny-moe", *plan(8), "--num-distributed-optimizer-instances", "4")
    batch = ("--global-batch-size", "16")
    (problem,) = find(*flags, *batch, "--expert-model-parallel-size", "4", platform="cuda")
    assert "num-distributed-optimizer-instances: must divide the 2 ranks that hold the same experts" in problem
    assert "got num_distributed_optimizer_instances=4. Use 1 or 2." in problem
    assert not find(*flags, *batch, "--expert-model-parallel-size", "2", platform="cuda")


@pytest.mark.parametrize(("value", "num_problems"), [("0.22", 0), ("0", 1), ("-1", 1)])
def test_a_residual_multiplier_is_positive(value: str, num_problems: int) -> None:
    problems = find(*TINY, f"--residual-multiplier={value}")
    assert len(problems) == num_problems
    assert all(
        f"residual-multiplier: must be a positive number, got residual_multiplier={value}." in p for p in problems
    )


@pytest.mark.parametrize("flag", ["--mup-base-head-dim=-4", "--mup-base-head-dim=0", "--mup-attn-scale-power=1e6"])
def test_a_scale_of_the_scores_that_is_none_is_refused(flag: str) -> None:
    problems = find(*TINY, "--use-mup", flag)
    assert [problem for problem in problems if "mup-base-head-dim: must give a positive scale" in problem]


@pytest.mark.parametrize("frequency", ["3", "[1,0]", "[0,0,0,1,0]"])
def test_layers_without_a_rope_fit_the_layers(frequency: str) -> None:
    (problem,) = find(*TINY, "--no-rope-freq", frequency)
    assert "no_rope" in problem


YARN = (*TINY, "--position-embedding-type", "yarn", "--yarn-original-max-position-embeddings", "64")


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ("--rotary-scaling-factor 4", None),
        ("--rotary-scaling-factor 0.5", "rotary-scaling-factor: must be at least 1 with"),
        ("--rotary-scaling-factor 4 --yarn-beta-fast 2 --yarn-beta-slow 3", "yarn-beta-fast: must be at least"),
        ("--rotary-scaling-factor 4 --mscale=-9", "mscale: must be one that makes a positive factor"),
        ("--rotary-scaling-factor 4 --rotary-base 1", "rotary-base: must be above 1"),
        ("--rotary-scaling-factor 4 --rotary-percent 0.5", "rotary-percent: has no effect with"),
        ("--rotary-scaling-factor 4 --rotary-seq-len-interpolation-factor 2", "factor: has no effect with"),
        ("--rotary-scaling-factor 4 --rotary-interleaved", "rotary-interleaved: turns neighbouring pairs"),
        ("--use-rotary-position-embeddings", "use-rotary-position-embeddings: overrules"),
    ],
)
def test_yarn_is_taken_where_megatron_computes_it(flags: str, match: str | None) -> None:
    problems = find(*YARN, *flags.split())
    assert problems == [] if match is None else [problem for problem in problems if match in problem]


def test_the_numbers_of_yarn_need_yarn() -> None:
    (problem,) = find(*TINY, "--rotary-scaling-factor", "4")
    assert "rotary-scaling-factor: has no effect without --position-embedding-type yarn" in problem


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ("--window-size 31,0", None),
        ("--window-size 31,0 --window-attn-skip-freq 2", None),
        ("--window-size 31,0 --window-attn-skip-freq [1,0,0,1]", None),
        ("--window-size 31,1", "window-size: must be how many tokens before a position it sees, and 0"),
        ("--window-size 31", "got window_size=31. Pass --window-size 4095,0"),
        ("--window-size=-1,0", "got window_size=-1,0."),
        ("--window-size 31,0 --window-attn-skip-freq 1", "window-attn-skip-freq: must leave layers with a window"),
        ("--window-size 31,0 --window-attn-skip-freq 0", "got window_attn_skip_freq=0."),
        ("--window-size 31,0 --window-attn-skip-freq [0,0,0,0]", "must leave layers with a window"),
        ("--window-size 31,0 --window-attn-skip-freq [1,0,1]", "one number for each of 4 layers, got 3."),
    ],
)
def test_windows_are_those_that_both_backends_have(flags: str, match: str | None) -> None:
    problems = find(*TINY, *flags.split())
    assert problems == [] if match is None else [problem for problem in problems if match in problem]


@pytest.mark.parametrize(("kind", "num_problems"), [("p2p", 1), ("a2a+p2p", 1), ("a2a", 0), ("all_gather", 0)])
def test_a_window_goes_with_context_parallelism_where_keys_are_exchanged_whole(kind: str, num_problems: int) -> None:
    flags = (*TINY, *plan(2), "--window-size", "31,0", "--context-parallel-size", "2", "--cp-comm-type", kind)
    if kind == "a2a+p2p":
        flags = (*flags, "--hierarchical-context-parallel-sizes", "1", "2")
    problems = find(*flags, platform="cuda", backend="te")
    assert sum("exchanges keys by a2a or all_gather alone" in problem for problem in problems) == num_problems
