"""A benchmark's result in words, where a number might be passed over."""

from lmeff.bench.measure import Result, Run

GB = 1e9


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
