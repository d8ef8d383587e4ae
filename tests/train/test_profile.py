"""Tracing steps: the asked ones, readable by xprof and perfetto, and training does not notice."""

import dataclasses
import gzip
import json
from collections import Counter

import jax
import pytest

from lmeff.core.errors import UsageError
from lmeff.train.loop import train
from lmeff.train.profile import PERFETTO, Profile, Tracer, Window, check, parse, skipped
from tests.train.tiny_run import STEPS, dying, fingerprint, make_job, make_state, quiet, run

WINDOW = Window(5, 7)


class Killed(Exception):
    pass


def killed():
    raise Killed


class Told:
    """Progress that keeps what it is told."""

    def __init__(self):
        self.lines, self._bar = [], quiet()

    def update(self, step, **values):
        self._bar.update(step, **values)

    def tell(self, line):
        self.lines.append(line)

    def close(self):
        self._bar.close()


def traced(directory, **options):
    """A run that is profiled: its final state, and what it told."""
    job = make_job(directory / "stages" / "tiny", **options)
    job = dataclasses.replace(job, profile=Profile(WINDOW, directory / "profile" / "tiny"))
    told = Told()
    state, _ = train(job, make_state(job.rt), progress=told, resume=True)
    return state, told.lines


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    directory = tmp_path_factory.mktemp("profiled")
    return directory / "profile" / "tiny", *traced(directory)


def test_what_is_written_and_told(profiled):
    folder, _, lines = profiled
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    assert files == [PERFETTO, "plugins/profile/steps_5_7/process_0.xplane.pb"]
    assert lines == [
        f"profiled steps 5 to 7: xprof --logdir {folder}   or open {folder / PERFETTO} at https://ui.perfetto.dev"
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


def test_training_is_bitwise_the_same(profiled, tmp_path):
    state, _ = run(make_job(tmp_path))
    assert fingerprint(state) == fingerprint(profiled[1])


def test_perfetto_has_the_steps_and_their_work(profiled):
    with gzip.open(profiled[0] / PERFETTO) as file:
        trace = json.load(file)
    assert "metadata" not in trace  # perfetto does not take it
    events = trace["traceEvents"]
    steps = [event for event in events if event.get("name") == "train"]
    assert [event["args"]["step_num"] for event in steps] == ["5", "6", "7"]
    # Step 4 was saved, so it had ended before; step 7 was waited for: every operation is there as often in each of the three.
    work = Counter(e["name"] for e in events if e.get("args", {}).get("hlo_module") == "jit_advance")
    assert len(work) > 50
    assert {name: count for name, count in work.items() if count % 3} == {}


def test_the_parts_of_the_model_are_named(profiled):
    raw = next(profiled[0].glob("plugins/profile/*/*.xplane.pb")).read_bytes()
    for name in (
        "jvp(embedding)/",
        "jvp(blocks)/",
        "transpose(jvp(blocks))/",
        "/attention/",
        "/mlp/",
        "jvp(final_norm)/",
        "jvp(head)/",
        "/optimizer/",
    ):
        assert name.encode() in raw, name


@pytest.mark.slow
def test_xprof_reads_the_steps(profiled, tmp_path):
    convert = pytest.importorskip("xprof.convert.raw_to_tool_data")
    file = tmp_path / "process_0.xplane.pb"  # it leaves its own files beside the trace
    file.write_bytes(next(profiled[0].glob("plugins/profile/*/*.xplane.pb")).read_bytes())
    data, _ = convert.xspace_to_tool_data([str(file)], "overview_page", {})
    tables = [table for table in json.loads(data) if table.get("cols", [{}])[0].get("id") == "stepnum"]
    assert [row["c"][0]["v"] for row in tables[0]["rows"]] == ["train 5", "train 6", "train 7"]


def test_cut_off_inside_the_window(tmp_path):
    """Nothing is left of a trace that did not end; what goes on after its first step says so, and trains on."""
    with pytest.raises(Killed):
        traced(tmp_path, batches=dying(6, killed), checkpoint_every=5)
    assert [*(tmp_path / "profile").iterdir()] == []
    state, lines = traced(tmp_path, checkpoint_every=5)
    assert lines == ["not profiled: steps 5 to 7 were asked for, and it goes on after step 5; choose later ones"]
    assert int(state.step) == STEPS
    jax.profiler.start_trace(tmp_path / "another")  # no trace is open any more
    jax.profiler.stop_trace()


def test_waits_for_the_devices_at_the_end_of_the_window_alone(monkeypatch, tmp_path):
    calls = []

    def start(folder, **options):
        calls.append("start")
        folder.mkdir(parents=True)

    monkeypatch.setattr(jax.profiler, "start_trace", start)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    monkeypatch.setattr(jax, "block_until_ready", lambda state: calls.append(f"wait for {state}"))
    with Tracer(Profile(WINDOW, tmp_path / "tiny"), lambda line: calls.append("tell"), start=0, steps=9) as tracer:
        for step in range(1, 10):
            tracer.begin(step)
            calls.append(step)
            tracer.end(step, step)
    assert calls == [1, 2, 3, 4, "start", 5, 6, 7, "wait for 7", "stop", "tell", 8, 9]


def test_a_trace_that_cannot_be_written_is_told_of(monkeypatch, tmp_path):
    def full():
        raise OSError(28, "No space\nleft on device")

    lines = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **options: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", full)
    with Tracer(Profile(Window(1, 1), tmp_path / "tiny"), lines.append, start=0, steps=2) as tracer:
        for step in (1, 2):
            tracer.begin(step)
            tracer.end(step, None)
    assert lines == ["not profiled: OSError: [Errno 28] No space left on device"]


def test_traced_again_nothing_of_the_first_trace_is_left(tmp_path):
    """xprof leaves what it worked out beside a trace, and would show that of the old one."""
    profile, square = Profile(Window(2, 2), tmp_path / "tiny"), jax.jit(lambda x: x * x)
    for _ in range(2):
        with Tracer(profile, lambda line: None, start=0, steps=2) as tracer:
            for step in (1, 2):
                tracer.begin(step)
                tracer.end(step, square(float(step)))
        (file,) = (profile.folder / "plugins/profile/steps_2_2").iterdir()
        assert b"lambda" in file.read_bytes()
        (file.parent / "ALL_HOSTS.op_stats_v2.pb").write_text("old")


@pytest.mark.parametrize(
    ("text", "window"),
    [("10:13", (10, 13)), ("10", (10, 10)), ("1:1", (1, 1)), ("007", (7, 7))],
    ids=lambda x: str(x),
)
def test_reads_steps(text, window):
    assert parse(text) == window


@pytest.mark.parametrize("text", ["", "a:b", "3:", ":3", "-1", "1:2:3", "1.5", "0", "0:3", "5:4", "1 2", "９" * 30])
def test_refuses_what_are_no_steps(text):
    with pytest.raises(UsageError, match=r"--profile: got '.*', expected .*10:13"):
        parse(text)


def test_refuses_steps_that_no_stage_takes():
    check(Window(10, 13), [("short", 5), ("long", 13), ("packed", 0)])
    with pytest.raises(UsageError, match=r"got steps 10 to 13, expected steps that a stage takes: short 5, long 12\."):
        check(Window(10, 13), [("short", 5), ("long", 12), ("packed", 0)])
    with pytest.raises(UsageError, match="got step 1, expected steps that a stage takes: none trains"):
        check(Window(1, 1), [("packed", 0)])


@pytest.mark.parametrize(
    ("start", "steps", "reason"),
    [
        (0, 7, None),
        (4, 7, None),
        (5, 7, "not profiled: steps 5 to 7 were asked for, and it goes on after step 5; choose later ones"),
        (0, 6, "not profiled: steps 5 to 7 were asked for, and it trains for 6"),
    ],
    ids=["whole", "begins there", "begins too late", "ends too early"],
)
def test_whole_or_not_at_all(start, steps, reason):
    assert skipped(WINDOW, start, steps) == reason
