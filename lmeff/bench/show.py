"""A benchmark's result as a table, and in words where a number might be passed over."""

from rich.table import Table

from lmeff.bench.measure import Result, Run

GB, MB = 1e9, 1e6


def table(result: Result) -> Table:
    """A row a format."""
    shape = result.shape
    what = (
        f"{shape.tokens} tokens after prompts of {shape.context}"
        if result.kind == "decode"
        else f"prompts of {shape.context} tokens"
    )
    made = Table(title=f"{result.kind}: batch {shape.batch}, {what}, {result.device}, {result.mesh}")
    speed = ["GB/s", "of measured", *(["of table"] if result.chip else [])]
    if result.kind == "prefill":
        speed = ["TFLOP/s", *(["of peak"] if result.chip else []), *speed]
    columns = ["format", "tokens/s", "ms/token", "quartiles", "weights MB", "moved MB", *speed, "x first", "compile s"]
    for i, name in enumerate(columns):
        made.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for run in result.runs:
        made.add_row(*_cells(result, run))
    return made


def _cells(result: Result, run: Run) -> list[str]:
    speed = [f"{run.bytes_per_second / GB:.1f}", f"{run.bandwidth_share:.0%}"]
    if run.table_share is not None:
        speed.append(f"{run.table_share:.0%}")
    if run.flops_per_second is not None:
        peak = [] if run.peak_share is None else [f"{run.peak_share:.0%}"]
        speed = [f"{run.flops_per_second / 1e12:.3g}", *peak, *speed]
    return [
        run.name,
        f"{run.tokens_per_second:,.1f}",
        f"{run.ms.median:.3g}",
        f"{run.ms.low:.3g} - {run.ms.high:.3g}",
        f"{run.stored / MB:,.1f}",
        f"{(run.read + run.cache) / MB:,.1f}",
        *speed,
        f"{run.ratio:.2f}",
        f"{run.compile_seconds:.1f}",
    ]


def words(result: Result) -> list[str]:
    """What the table does not say by itself: the bandwidth it compares with, and every format that is no faster than the first."""
    rate = result.bandwidth
    told = [
        f"Measured memory bandwidth: {rate.median / GB:.1f} GB/s (quartiles {rate.low / GB:.1f} to {rate.high / GB:.1f}), in turn with the runs."
    ]
    first = result.runs[0]
    for run in result.runs[1:]:
        if run.ratio < 0.995:
            told.append(slower(run, first))
        elif run.ms.high >= first.ms.low or run.ratio < 1:
            told.append(
                f"{run.name} is not told apart from {first.name}: their quartiles overlap. More turns, or a quieter machine, may tell."
            )
    return told


def slower(run: Run, first: Run) -> str:
    """A format that costs speed, in one sentence or two."""
    moved = (run.read + run.cache) / (first.read + first.cache)
    noise = " Their quartiles overlap, so it may be noise." if run.ms.low <= first.ms.high else ""
    took = f"{run.ms.median:.3g} against {first.ms.median:.3g} ms a token"
    return f"{run.name} is SLOWER than {first.name} here: {run.ratio:.2f} times its speed ({took}), though it moves {moved:.2f} times its bytes.{noise}"
