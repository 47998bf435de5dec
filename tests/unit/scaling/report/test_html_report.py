"""The page: complete, self-contained, escaped, with its assumptions and the coefficients' provenance and error."""

import base64
import re
from dataclasses import replace

import pytest

from megatron_hammer.scaling.report.decision import Decision
from megatron_hammer.scaling.report.html_report import (
    flatten_provenance,
    list_assumptions,
    list_findings,
    render_html_report,
)
from megatron_hammer.scaling.report.projection_tables import ResultTable, build_tables
from megatron_hammer.scaling.search.projection import StudyResult
from tests.helpers.toy_study import build_toy_study, project_toy_study

PROVENANCE = {
    "date": "2026-01-31",
    "num_runs": 377,
    "cross_validated_median_ratio": 0.0712,
    "fingerprints": [str(number) for number in range(377)],
    "by_source": {"team_a": 0.05},
}


DECISION = Decision(
    headline="Train it <now>.",
    actions=("Pass --save-interval 7.",),
    doubts=("It is tied with row 4-2.",),
    options=ResultTable(title="The options", columns=("GPUs", "days"), groups=((("4", "12.5"),),)),
    assumptions=("Failures: 1 per day.",),
)


@pytest.fixture(scope="module")
def result() -> StudyResult:
    study = build_toy_study(gpu_counts=(4, 13, 8), usd_per_gpu_hour=2.5)
    return project_toy_study(study, provenance=PROVENANCE)


def test_the_page_is_whole_and_links_to_nothing(result: StudyResult) -> None:
    images = {"scaling": b"first image", "breakdown": b"second", "memory": b"third"}
    page = render_html_report(result, images, DECISION)
    assert page.startswith("<!DOCTYPE html>")
    assert page.rstrip().endswith("</html>")
    embedded = re.findall(r'<img alt="[^"]{20,}" src="data:image/png;base64,([A-Za-z0-9+/=]+)">', page)
    assert [base64.b64decode(image) for image in embedded] == list(images.values())
    assert re.findall(r"https?://|<script|<link|@import|url\(", page) == []
    for table in build_tables(result):
        assert f"<h2>{table.title}</h2>" in page
        for row in (row for group in table.groups for row in group):
            assert all(f">{cell}</td>" in page for cell in row)
    for opened in ("table", "tbody", "tr", "td", "ul", "li", "figure", "h2"):
        assert len(re.findall(rf"<{opened}[ >]", page)) == page.count(f"</{opened}>")


def test_the_decision_comes_first(result: StudyResult) -> None:
    page = render_html_report(result, {}, DECISION)
    places = [
        page.index(words) for words in ("Train it &lt;now&gt;.", "--save-interval 7", "row 4-2", "12.5", "<h2>Why")
    ]
    assert places == sorted(places)
    assert "Failures: 1 per day." in page[page.index("What the numbers assume") :]


def test_wide_parts_scroll_in_their_own_box(result: StudyResult) -> None:
    """So the page itself is as wide as a phone. Seen in Chromium at 390 and 1,300 pixels."""
    page = render_html_report(result, {"scaling": b"x"}, DECISION)
    parts = page.split("<h2>Where the inputs come from")[0]
    assert parts.count('<div class="scroll">') == parts.count("<table>") + parts.count("<img ")


def test_the_same_result_gives_the_same_page(result: StudyResult) -> None:
    assert render_html_report(result, {}, DECISION) == render_html_report(result, {}, DECISION)


def test_names_are_escaped(result: StudyResult) -> None:
    page = render_html_report(result, {}, DECISION)
    assert "invented &lt;racks&gt; &amp; cables" in page
    assert "<racks>" not in page


def test_problems_and_provenance_are_on_it(result: StudyResult) -> None:
    page = render_html_report(result, {}, DECISION)
    assert "Sizes at which nothing fits" in page
    assert "gpus: hammer-1b4 must divide over them, got gpus=13" in page
    assert "<td>fingerprints</td><td>377 entries</td>" in page
    assert "<td>cross validated median</td><td>7.1%</td>" in page
    assert "<td>by source: team a</td><td>0.05</td>" in page


def test_the_assumptions_name_what_a_number_rests_on(result: StudyResult) -> None:
    text = "\n".join(list_assumptions(result))
    for words in (
        "MFU is in convention A: layers and head, causal attention",
        "a dense peak of 100 TFLOP/s (bf16)",
        "A plan may need 38.0 GiB of a GPU's 40.0 GiB",
        "for this GPU and precision -10% to +20%. The median error of the step time on such runs, each source left "
        "out in turn, is 7.1%.",
        "400 W per GPU at full load, 800 W for the rest of a node of 8, power usage effectiveness 1.25",
        "Cost: 2.5 USD per GPU-hour",
        "Gradients travel in 4 bytes",
        "at least 80% of the best tokens/s/GPU",
    ):
        assert words in text
    bare = replace(result, provenance={}, study=replace(result.study, usd_per_gpu_hour=None))
    text = "\n".join(list_assumptions(bare))
    assert "The coefficients file states no error on runs that it had not seen." in text
    assert "Cost: no price is known." in text
    assert "says nothing of its provenance" in render_html_report(bare, {}, DECISION)


def test_findings(result: StudyResult) -> None:
    knee, at_largest = list_findings(result)
    assert knee.startswith("Knee: not reached at 8 GPUs")
    assert at_largest.startswith("8 GPUs: ")
    assert "10B tokens take" in at_largest
    assert " USD." in at_largest
    nothing = project_toy_study(build_toy_study(memory_limit_bytes=2**30, gpu_counts=(2,)))
    assert list_findings(nothing) == ["Knee: none, as nothing fits at any size."]
    assert "Charts" not in render_html_report(nothing, {}, Decision(headline="none"))


def test_short_lists_are_written_out() -> None:
    assert flatten_provenance({"sources": ["a", "b"], "weight": 0.123456, "n": 3}) == [
        ("sources", "a, b"),
        ("weight", "0.1235"),
        ("n", "3"),
    ]
