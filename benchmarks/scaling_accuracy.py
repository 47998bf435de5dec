#!/usr/bin/env python3
"""Refit the shipped coefficients, and write every figure of the documents that depends on them.

    python benchmarks/scaling_accuracy.py            # names the files that are out of date, and exits with 1 if any is
    python benchmarks/scaling_accuracy.py --write    # brings them up to date

The coefficients are fitted from the priors, as `calibrate --from-priors` does, so it also works while the shipped file
holds the marks of a merge conflict. In docs/scaling_accuracy.md it replaces what stands between the two comments of
each block, in README.md and README_zh-CN.md the figures of two rows. tests/numerics/test_published_accuracy.py
compares all of them.
"""

import argparse
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_hammer.files.publish import publish_files
from megatron_hammer.files.tables import format_markdown_table
from megatron_hammer.scaling.cost.coefficients import (
    SHIPPED_PATH,
    Coefficients,
    build_prior_coefficients,
    format_coefficients,
    load_coefficients,
)
from megatron_hammer.scaling.evidence.calibration import select_fit_runs
from megatron_hammer.scaling.evidence.cross_validation import assess, calibrate, cross_validate
from megatron_hammer.scaling.evidence.layout_ranking import RANKING_TOLERANCE_RATIO, describe_choice, summarise_rankings
from megatron_hammer.scaling.evidence.validation import (
    ErrorFigures,
    ValidationReport,
    build_validation_report,
    cross_validate_runs,
)
from megatron_hammer.scaling.evidence.validation_report import format_figures
from megatron_hammer.scaling.memory.validation import MemoryReport, validate_memory
from megatron_hammer.scaling.published.measured_runs import MeasuredRun, UnpredictableRow, read_runs
from megatron_hammer.scaling.published.run_table import (
    PUBLISHED_MEMORY_PATH,
    PUBLISHED_MOE_PATH,
    PUBLISHED_RUNS_PATH,
    VTRAIN_RUNS_PATH,
    VTRAIN_SOURCE,
)

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT_PATH = ROOT / "docs" / "scaling_accuracy.md"
COMMAND = "python tools/scaling_study.py validate --cross-validate"
EXPERTS_COMMAND = f"{COMMAND} --runs megatron_hammer/scaling/published/tables/published_moe.csv"
README_PATHS = (ROOT / "README.md", ROOT / "README_zh-CN.md")
WIDTH = 125
FIGURES = ("rows", "refused", "median", "mean", "bias", "in the band")
OTHERS = "other software, which the fit never sees"
ErrorRow = tuple[str, ErrorFigures | None, int | None]  # a group, its errors if any row was predicted, refused rows


def main() -> None:
    """Compare, or write, and say what changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the files that are out of date")
    arguments = parser.parse_args()
    announce = partial(print, file=sys.stderr, flush=True)
    announce("fitting the shipped coefficients")
    text = keep_date(format_coefficients(fit_shipped_coefficients()), SHIPPED_PATH.read_text(encoding="utf-8"))
    texts = {SHIPPED_PATH: text}
    with TemporaryDirectory() as folder:
        # As everyone reads them: the file has fewer digits than the fit, and a run may lie at the edge of its band.
        (Path(folder) / SHIPPED_PATH.name).write_text(text, encoding="utf-8")
        coefficients = load_coefficients(Path(folder) / SHIPPED_PATH.name)
    runs, unpredictable = read_runs(PUBLISHED_RUNS_PATH)
    report = cross_validate_runs(runs, unpredictable, announce, shipped=coefficients)
    experts = cross_validate_runs(*read_runs(PUBLISHED_MOE_PATH), announce, shipped=coefficients)
    texts |= build_documents(report, experts, validate_memory(PUBLISHED_MEMORY_PATH), coefficients)
    changed = {path: text for path, text in texts.items() if path.read_text(encoding="utf-8") != text}
    if arguments.write:
        publish_files(changed)
    for path in changed:
        print(f"{path.relative_to(ROOT)}: {'written' if arguments.write else 'out of date'}")
    print(f"{len(texts)} files compared, {len(changed)} {'written' if arguments.write else 'out of date'}")
    sys.exit(1 if changed and not arguments.write else 0)


def fit_shipped_coefficients() -> Coefficients:
    """Fit from the priors to all shipped tables, with the bands and the provenance of a file that can be shipped."""
    runs, start = read_fit_runs(), build_prior_coefficients()
    return calibrate(runs, start, assess(cross_validate(runs, start)))


def read_fit_runs() -> list[MeasuredRun]:
    """The runs of all shipped tables that the shipped coefficients are fitted to."""
    paths = (PUBLISHED_RUNS_PATH, VTRAIN_RUNS_PATH, PUBLISHED_MOE_PATH)
    return select_fit_runs([run for path in paths for run in read_runs(path)[0] if run.is_megatron_style])


def keep_date(text: str, older: str) -> str:
    """The older text where only the date differs: a fit that changed nothing must not change the file."""
    date = re.compile(r"^date = .*$", re.MULTILINE)
    return older if date.sub("", text) == date.sub("", older) else text


def build_documents(
    report: ValidationReport, experts: ValidationReport, memory: MemoryReport, coefficients: Coefficients
) -> dict[Path, str]:
    """The documents with the figures of these reports, by path. experts: of the table of models with experts."""
    text = DOCUMENT_PATH.read_text(encoding="utf-8")
    for name, block in build_blocks(report, experts, memory, coefficients.provenance).items():
        text = replace_block(text, name, block)
    readmes = {path: path.read_text(encoding="utf-8") for path in README_PATHS}
    for command, errors in ((COMMAND, report.errors), (EXPERTS_COMMAND, experts.errors)):
        readmes = {
            path: replace_readme_row(readme, command, errors["software"]["Megatron-style"])
            for path, readme in readmes.items()
        }
    return {DOCUMENT_PATH: text, **readmes}


def replace_block(text: str, name: str, block: str) -> str:
    """The text with another content between the two comments that name a block."""
    first = f"<!-- {name}: written by benchmarks/scaling_accuracy.py -->\n"
    last = f"<!-- end of {name} -->\n"
    before, found_first, rest = text.partition(first)
    _, found_last, after = rest.partition(last)
    if not (found_first and found_last):
        raise SystemExit(f"{DOCUMENT_PATH}: must have the comments {first.strip()} and {last.strip()}. Add them.")
    return f"{before}{first}\n{block}\n{last}{after}"


def replace_readme_row(text: str, command: str, figures: ErrorFigures) -> str:
    """The text with the number of rows and the median and mean error in the row of a cross-validation."""
    (row,) = find_readme_rows(text, command)
    errors = iter((f"{figures.median_absolute_ratio:.1%}", f"{figures.mean_absolute_ratio:.1%}"))
    changed = re.sub(r"\d+(?=( published| 次))", str(figures.num_rows), row)
    return text.replace(row, re.sub(r"[\d.]+%", lambda _: next(errors), changed))


def find_readme_rows(text: str, command: str) -> list[str]:
    """The rows of the table of measurements that end with a command."""
    return re.findall(rf"^\|.*`{re.escape(command)}` \|$", text, re.MULTILINE)


def fill(sentences: str) -> str:
    """A paragraph in lines of the width that the documents have."""
    return textwrap.fill(sentences, WIDTH, break_long_words=False, break_on_hyphens=False) + "\n"


def build_blocks(
    report: ValidationReport, experts: ValidationReport, memory: MemoryReport, provenance: Mapping[str, Any]
) -> dict[str, str]:
    """The blocks of docs/scaling_accuracy.md by name, in Markdown."""
    return {
        "step times": format_step_times(report),
        "experts": format_step_times(experts),
        "fit": format_fit(provenance),
        "memory": format_memory(memory),
    }


def format_step_times(report: ValidationReport) -> str:
    """Counts, errors by group and by source, and the ranking of layouts."""
    num_refused = len(report.unpredictable)
    counts = fill(
        f"Of {len(report.predictions) + num_refused} published runs, {len(report.predictions)} are predicted and "
        f"{num_refused} are listed with the reason why not. {format_contradictions(report)}"
    )
    megatron = [one for one in report.predictions if one.run.is_megatron_style]
    groups = build_validation_report(megatron, []).errors
    styles = [(name, figures) for group in ("GPU", "precision") for name, figures in sort_groups(groups[group])]
    styles += [(re.sub(r"(\d)-(\d)", r"\1 to \2", name), figures) for name, figures in groups["scale"].items()]
    software, refused = report.errors["software"], report.refused["software"]
    first, other = (("**all**", software[name], refused.get(name, 0)) for name in ("Megatron-style", "other software"))
    tables = (
        format_errors("Megatron-core, and stacks like it", [first, *((*style, None) for style in styles)]),
        format_errors("by source", list_sources(report, is_megatron_style=True)),
        format_errors(OTHERS, [other, *list_sources(report, is_megatron_style=False)]),
    )
    return "\n".join([counts, *tables, format_reasons(report.unpredictable), format_ranking(report)])


def format_contradictions(report: ValidationReport) -> str:
    """How many predicted rows have cells that cannot all be true, and of which sources."""
    rows = Counter(one.run.source.replace("_", " ") for one in report.predictions if one.run.contradictions)
    named = ", ".join(f"{number} of {source}" for source, number in sorted(rows.items())) or "none"
    total = rows.total()
    return f"Of the predicted ones, {total} have cells that contradict each other, which `validate` names ({named})."


def list_sources(report: ValidationReport, *, is_megatron_style: bool) -> list[ErrorRow]:
    """The sources of one kind of software with their errors and refused rows, those with most predictions first."""
    predicted = [one for one in report.predictions if one.run.is_megatron_style == is_megatron_style]
    refused = Counter(row.source for row in report.unpredictable if row.is_megatron_style == is_megatron_style)
    sources = build_validation_report(predicted, []).errors["source"]
    rows: list[ErrorRow] = [(name, figures, refused[name]) for name, figures in sort_groups(sources)]
    rows += [(name, None, number) for name, number in sorted(refused.items()) if name not in sources]
    return [(name.replace("_", " "), figures, number) for name, figures, number in rows]


def format_reasons(unpredictable: Iterable[UnpredictableRow]) -> str:
    """Why rows were refused, by source and reason."""
    reasons = Counter((row.source.replace("_", " "), row.reason) for row in unpredictable)
    rows = [(source, reason, str(number)) for (source, reason), number in reasons.items()]
    return format_markdown_table(("refused", "reason", "rows"), rows, num_text=2)


def sort_groups(groups: Mapping[str, ErrorFigures]) -> list[tuple[str, ErrorFigures]]:
    """The largest first; names decide between equal ones."""
    return sorted(groups.items(), key=lambda item: (-item[1].num_rows, item[0]))


def format_errors(title: str, rows: Iterable[ErrorRow]) -> str:
    """A table of errors. A number of refused rows that is None is not known, as of a GPU that a row does not name."""
    cells = []
    for name, figures, refused in rows:
        num_rows, *errors = format_figures(figures) if figures else ("0", *"----")
        cells.append((name, num_rows, "" if refused is None else str(refused), *errors))
    return format_markdown_table((title, *FIGURES), cells)


def format_ranking(report: ValidationReport) -> str:
    """The regret of following the prediction: in a sentence, and for every job where it was not the best."""
    summary = summarise_rankings(report.rankings)
    assert summary is not None
    text = (
        f"{summary.num_groups} jobs were published in several layouts. In {summary.num_within_5_percent} of them the "
        f"layout predicted to be the best is within {RANKING_TOLERANCE_RATIO:.0%} of the measured best. The mean loss "
        f"is {summary.mean_loss_ratio:.1%}, and the largest {summary.worst_loss_ratio:.1%}."
    )
    if not summary.worst_loss_ratio:
        return fill(text)
    text += " The table has every job in which another layout was measured to be faster."
    rows = [
        (
            f"{one.source.replace('_', ' ')}: {one.description}",
            describe_choice(one.predicted_best.plan),
            describe_choice(one.measured_best.plan),
            str(one.num_layouts),
            f"{one.loss_ratio:.1%}",
        )
        for one in sorted(report.rankings, key=lambda one: (-one.loss_ratio, one.predicted_best.row_number))
        if one.loss_ratio > 0
    ]
    columns = ("job", "predicted best", "measured best", "layouts", "slower by")
    return f"{fill(text)}\n{format_markdown_table(columns, rows, num_text=3)}"


def format_fit(provenance: Mapping[str, Any]) -> str:
    """What the coefficients were fitted on, and the cross-validated errors of all these rows."""
    num_runs = sum(provenance["sources"].values())
    num_vtrain, num_experts = provenance["sources"][VTRAIN_SOURCE], provenance["num_runs_with_experts"]
    num_dense = num_runs - num_vtrain - num_experts
    return fill(
        f"They are fitted to the {num_dense} Megatron-style rows of published_runs.csv and to {num_vtrain} "
        "of vTrain's measurements on a single node, which scatter more. Those of experts are fitted, with all others "
        f"held, to the {num_experts} Megatron-style rows of published_moe.csv. The cross-validated median error of all "
        f"is {provenance['cross_validated_median_ratio']:.1%} and the mean is "
        f"{provenance['cross_validated_mean_ratio']:.1%} (`provenance` in the coefficients file)."
    )


def format_memory(memory: MemoryReport) -> str:
    """Counts, and errors by source."""
    num_rows = len(memory.rows) + len(memory.unpredictable)
    rows = [
        (
            group.name.replace("_", " "),
            str(group.num_rows),
            f"{group.median_absolute_error_ratio:.1%}",
            f"{group.mean_absolute_error_ratio:.1%}",
            f"{group.largest_error_ratio:+.1%}",
            f"{group.within_5_percent_ratio:.0%}",
        )
        for group in sorted(memory.groups, key=lambda group: (-group.num_rows, group.name))
        if group.by == "source"
    ]
    counts = fill(
        f"Of {num_rows} published figures, {len(memory.rows)} are predicted and {len(memory.unpredictable)} are listed "
        "with the reason why not."
    )
    columns = ("memory", "rows", "median", "mean", "largest", "within 5%")
    return f"{counts}\n{format_markdown_table(columns, rows)}"


if __name__ == "__main__":
    main()
