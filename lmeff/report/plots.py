"""All pictures of a report."""

from lmeff.report.curves import curves_plot
from lmeff.report.figures import Plot
from lmeff.report.forest import comparisons_plot
from lmeff.report.frontier import frontier_plot
from lmeff.report.schema import Report
from lmeff.report.words import AXES


def make_plots(report: Report) -> dict[str, Plot]:
    """Every picture the report has data for, by key: `bytes`, `flops`, `ms`, `curves`, `comparisons`."""
    plots = [*(frontier_plot(report, axis) for axis in AXES), curves_plot(report), comparisons_plot(report)]
    return {plot.key: plot for plot in plots if plot is not None}
