import math

import pytest

from megatron_hammer.evaluation.token_plot import Curve, Panel, Point, draw_panels, format_tokens


def test_everything_in_a_panel_is_drawn() -> None:
    points = [Point(1000, 20.0, 18.0, 22.0), Point(2000, 30.0, math.nan, math.nan)]
    curve = Curve(label="piqa", points=points)
    pictures = [
        draw_panels(panels)
        for panels in (
            [Panel(unit="per cent", curves=[curve])],
            [Panel(unit="per cent", curves=[Curve(label="piqa", points=points, chance=25.0)])],
            [Panel(unit="per cent", curves=[Curve(label="piqa", points=points, levels={"hf": 25.0})])],
            [Panel(unit="per cent", curves=[curve], is_logarithmic=True)],
            [Panel(unit="per cent", curves=[curve]), Panel(unit="perplexity", curves=[curve])],
        )
    ]
    assert len(set(pictures)) == len(pictures)
    assert pictures[0] == draw_panels([Panel(unit="per cent", curves=[curve])])


@pytest.mark.parametrize(
    ("num_tokens", "text"),
    [(None, "-"), (820, "820"), (50_000_000_000, "50B"), (1_310_720, "1.311M"), (3_000_000_000_000, "3T")],
)
def test_numbers_of_tokens_are_short(num_tokens: int | None, text: str) -> None:
    assert format_tokens(num_tokens) == text
