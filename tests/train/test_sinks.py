"""Sinks over metrics.jsonl: each step once, whatever happens to the run; what happens to a sink does not touch the run."""

import dataclasses
import json
import struct
import sys

import pytest

from lmeff.core.errors import ConfigError, MissingExtra
from lmeff.train import metrics
from lmeff.train.loop import train
from lmeff.train.metrics import MetricsWriter, read_metrics
from lmeff.train.sinks import SINKS, LogConfig, Place, Sinks, check, token
from tests.train.tiny_run import dying, fingerprint, make_job, make_state, quiet, run

CONFIG = {
    "seed": 0,
    "train.batch": 8,
    "optim.nesterov": True,
    "precision": "float32",
    "log.sinks": ("tensorboard",),
    "x": None,
}
RESULTS = {"artifact/loss": 3.25, "artifact/stored_bytes": 4096}


class Killed(Exception):
    pass


def killed():
    raise Killed


def place(directory, stage="tiny"):
    return Place(directory, "small", stage, CONFIG)


def rows(*steps):
    return [{"step": step, "time": 1e9 + step, "loss": step / 2, "kl": None} for step in steps]


class Fake:
    """A sink that keeps what it gets, and breaks where it is told to."""

    made: list["Fake"]
    first = 0
    breaks: tuple[object, ...] = ()

    def __init__(self, config, place):
        self.config, self.place, self.got = config, place, []
        self.made.append(self)
        self._may("open")

    def _may(self, what):
        if what in self.breaks:
            raise OSError(28, "No space\nleft on device")

    def write(self, step, values):
        self._may(step)
        self.got.append((step, values))

    def summary(self, values):
        self._may("summary")
        self.got.append(("summary", values))

    def close(self):
        self._may("close")
        self.got.append("closed")


def fake(monkeypatch, name, **fields):
    """Puts a fake in the place of a sink; gives the list of those that are made."""
    kind = type(name, (Fake,), {"made": [], **fields})
    monkeypatch.setitem(SINKS, name, kind)
    return kind.made


def test_rows_go_to_every_sink(monkeypatch, tmp_path):
    first, late = fake(monkeypatch, "tensorboard"), fake(monkeypatch, "wandb", first=3)
    told = []
    sinks = Sinks(LogConfig(sinks=("tensorboard", "wandb")), place(tmp_path), rows(1, 2, 3), told.append)
    sinks.write(rows(4)[0])
    sinks.summary(RESULTS)
    sinks.close()
    want = [(step, {"time": 1e9 + step, "loss": step / 2}) for step in (1, 2, 3, 4)]
    assert first[0].got == [*want, ("summary", RESULTS), "closed"]
    assert late[0].got == [*want[2:], ("summary", RESULTS), "closed"]
    assert told == sinks.failed == []


@pytest.mark.parametrize("at", ["open", 2, 4, "summary", "close"])
def test_a_sink_that_fails_is_told_of_once_and_dropped(monkeypatch, tmp_path, at):
    broken, whole = fake(monkeypatch, "trackio", breaks=(at,)), fake(monkeypatch, "tensorboard")
    told = []
    sinks = Sinks(LogConfig(sinks=("trackio", "tensorboard")), place(tmp_path), rows(1, 2), told.append)
    for row in rows(3, 4, 5):
        sinks.write(row)
    sinks.summary(RESULTS)
    sinks.close()
    assert told == [
        f"trackio is dropped (OSError: [Errno 28] No space left on device); metrics.jsonl goes on, and `lmeff log {tmp_path} --sinks trackio` replays it"
    ]
    assert sinks.failed == ["trackio"]
    assert [step for step, _ in broken[0].got[:-1]] == [1, 2, 3, 4, 5][: {"open": 0, 2: 1, 4: 3}.get(at, 5)][
        : len(broken[0].got[:-1])
    ]
    assert [entry[0] for entry in whole[0].got] == [1, 2, 3, 4, 5, "summary", "c"]


def with_sinks(directory, told, sinks=("tensorboard",), **options):
    job = make_job(directory / "stages" / "tiny", **options)
    config = LogConfig(sinks=sinks)
    return dataclasses.replace(job, sinks=lambda kept: Sinks(config, place(directory), kept, told.append))


def test_training_does_not_notice_a_sink_that_fails(monkeypatch, tmp_path):
    broken = fake(monkeypatch, "wandb", breaks=(6,))
    told = []
    job = with_sinks(tmp_path / "a", told, ("wandb",))
    state, _ = train(job, make_state(job.rt), progress=quiet(), resume=True)
    plain, _ = run(make_job(tmp_path / "b"))
    assert fingerprint(state) == fingerprint(plain)
    assert len(told) == 1
    assert [step for step, _ in broken[0].got] == [1, 3]
    assert [row["step"] for row in read_metrics(job.directory / "metrics.jsonl")] == [1, 3, 6, 9, 12]


def test_the_first_process_alone_opens_sinks(monkeypatch, tmp_path):
    monkeypatch.setattr(metrics, "leads", lambda: False)
    writer = MetricsWriter(tmp_path / "metrics.jsonl", sinks=lambda kept: pytest.fail("opened"))
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert [*tmp_path.iterdir()] == []


# TensorBoard


def records(file):
    """The payloads of a TFRecord file: length (8 bytes), its checksum (4), payload, its checksum (4)."""
    raw, at = file.read_bytes(), 0
    while at < len(raw):
        (length,) = struct.unpack_from("<Q", raw, at)
        yield raw[at + 12 : at + 12 + length]
        at += 16 + length


def events(directory, stage="tiny"):
    """What TensorBoard is given for a stage."""
    pb = pytest.importorskip("tensorboardX.proto.event_pb2")
    (file,) = (directory / "tensorboard" / stage).iterdir()
    return [pb.Event.FromString(record) for record in records(file)]


def scalars(directory, stage="tiny"):
    """`{tag: [(step, value)]}` in the order of the file."""
    found = {}
    for event in events(directory, stage):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def expected(directory):
    """The same from the lines of metrics.jsonl, in TensorBoard's float32."""
    found = {}
    for row in read_metrics(directory / "stages" / "tiny" / "metrics.jsonl"):
        for tag in row.keys() - {"step", "time"}:
            (value,) = struct.unpack("f", struct.pack("f", row[tag]))
            found.setdefault(tag, []).append((row["step"], value))
    return found


def test_tensorboard_holds_the_rows(tmp_path):
    sinks = Sinks(LogConfig(sinks=("tensorboard",)), place(tmp_path), rows(1, 2), pytest.fail)
    assert scalars(tmp_path) == {"loss": [(1, 0.5), (2, 1.0)]}  # before closing: there once written
    assert [event.wall_time for event in events(tmp_path)[-2:]] == [1e9 + 1, 1e9 + 2]
    sinks.summary(RESULTS)
    sinks.close()
    assert scalars(tmp_path) == {
        "loss": [(1, 0.5), (2, 1.0)],
        "artifact/loss": [(2, 3.25)],
        "artifact/stored_bytes": [(2, 4096)],
    }


def test_tensorboard_holds_the_settings(tmp_path):
    pb = pytest.importorskip("tensorboardX.proto.plugin_hparams_pb2")
    sinks = Sinks(LogConfig(sinks=("tensorboard",)), place(tmp_path), [], pytest.fail)
    sinks.summary(RESULTS)
    sinks.close()
    data = {
        value.tag: pb.HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for event in events(tmp_path)
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "hparams"
    }
    settings = data["_hparams_/session_start_info"].session_start_info.hparams
    assert {name: settings[name].WhichOneof("kind") for name in CONFIG} == {
        "seed": "number_value",
        "train.batch": "number_value",
        "optim.nesterov": "bool_value",
        "precision": "string_value",
        "log.sinks": "string_value",
        "x": "string_value",
    }
    assert settings["train.batch"].number_value == 8
    told = [info.name.tag for info in data["_hparams_/experiment"].experiment.metric_infos]
    assert sorted(told) == sorted(RESULTS)


@pytest.mark.parametrize("at", [3, 8], ids=["before a checkpoint", "after one"])
def test_killed_and_resumed_each_step_is_there_once(tmp_path, at):
    told = []
    job = with_sinks(tmp_path, told, batches=dying(at, killed), log_every=1)
    with pytest.raises(Killed):
        train(job, make_state(job.rt), progress=quiet(), resume=True)
    before = scalars(tmp_path)["loss"]
    assert [step for step, _ in before] in (
        [*range(1, at)],
        [*range(1, at + 1)],
    )  # a step that is saved is logged before
    assert scalars(tmp_path) == expected(tmp_path)
    job = with_sinks(tmp_path, told, log_every=1)
    train(job, make_state(job.rt), progress=quiet(), resume=True)
    found = scalars(tmp_path)
    assert [step for step, _ in found["loss"]] == [*range(1, 13)]
    assert found == expected(tmp_path)
    assert told == []


def test_a_sink_that_is_added_later_has_the_earlier_steps_too(tmp_path):
    told = []
    with pytest.raises(Killed):
        run(make_job(tmp_path / "stages" / "tiny", batches=dying(8, killed)))
    job = with_sinks(tmp_path, told)
    train(job, make_state(job.rt), progress=quiet(), resume=True)
    assert scalars(tmp_path) == expected(tmp_path)
    assert [step for step, _ in scalars(tmp_path)["loss"]] == [1, 3, 6, 9, 12]


def test_tensorboard_reads_it(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for _ in range(2):  # an open TensorBoard sees the second one take the first one's place
        sinks = Sinks(LogConfig(sinks=("tensorboard",)), place(tmp_path), rows(1, 2, 5), pytest.fail)
        sinks.summary(RESULTS)
        sinks.close()
        reader = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "tiny"))
        reader.Reload()
        assert [(x.step, x.value, x.wall_time) for x in reader.Scalars("loss")] == [
            (1, 0.5, 1e9 + 1),
            (2, 1.0, 1e9 + 2),
            (5, 2.5, 1e9 + 5),
        ]
        assert [(x.step, x.value) for x in reader.Scalars("artifact/loss")] == [(5, 3.25)]


def test_a_folder_that_cannot_be_written(tmp_path):
    told = []
    (tmp_path / "tensorboard").write_text("in the way")
    sinks = Sinks(LogConfig(sinks=("tensorboard",)), place(tmp_path), rows(1), told.append)
    sinks.write(rows(2)[0])
    sinks.close()
    assert len(told) == 1
    assert "tensorboard is dropped" in told[0]


# Weights & Biases and trackio, where they are installed; nothing leaves the machine.


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """No account, no settings but these, and no store that is shared with others."""
    for name in ("WANDB_API_KEY", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("WANDB_MODE", "offline")
    return tmp_path


def wandb_records(file):
    """The records of a run that was not uploaded: a log in blocks of 32 KiB, as LevelDB has it, after a header of 7 bytes.

    Each part of a record is its checksum (4 bytes), its length (2), its kind (1: whole, 2: first, 3: middle, 4: last) and its bytes.
    """
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    raw, at, record = file.read_bytes(), 7, b""
    assert raw[:4] == b":W&B"
    while at + 7 <= len(raw):
        if at % 32768 > 32768 - 7:  # no header fits here
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", raw, at + 4)
        record += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield pb.Record.FromString(record)
            record = b""


def wandb_found(directory, stage="tiny"):
    """History as `{key: [(step, value)]}`, and the summary."""
    (file,) = directory.glob(f"wandb/offline-run-*-{stage}-*/*.wandb")
    history, summary = {}, {}
    for record in wandb_records(file):
        values = {"/".join(x.nested_key) or x.key: json.loads(x.value_json) for x in record.history.item}
        for key, value in values.items():
            history.setdefault(key, []).append((record.history.step.num, value))
        summary |= {"/".join(x.nested_key) or x.key: json.loads(x.value_json) for x in record.summary.update}
    return history, summary


def test_wandb_offline_has_each_step_once(alone):
    wandb = pytest.importorskip("wandb")
    config = LogConfig(sinks=("wandb",), offline=True)
    check(config)
    first = Sinks(config, place(alone), rows(1, 2, 3), pytest.fail)
    first.close()
    sinks = Sinks(config, place(alone), rows(1, 2), pytest.fail)  # resumed from step 2
    for row in rows(3, 4):
        sinks.write(row)
    sinks.summary(RESULTS)
    sinks.close()
    wandb.teardown()  # as the end of the process does: its service writes on for a moment
    history, summary = wandb_found(alone)
    assert history["loss"] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    assert [time for _, time in history["_timestamp"]] == [1e9 + step for step in (1, 2, 3, 4)]
    assert "kl" not in history
    assert {name: summary[name] for name in RESULTS} == RESULTS
    assert f"small-tiny-{token(alone)}" in next(alone.glob("wandb/offline-run-*")).name


def test_trackio_has_each_step_once(alone, monkeypatch):
    pytest.importorskip("trackio")
    utils, storage = pytest.importorskip("trackio.utils"), pytest.importorskip("trackio.sqlite_storage")
    for module in (utils, storage, sys.modules["trackio"]):
        monkeypatch.setattr(module, "TRACKIO_DIR", alone / "store")
    config = LogConfig(sinks=("trackio",), project="of-a-test")
    check(config)
    first = Sinks(config, place(alone), rows(1, 2, 3), pytest.fail)
    first.close()
    sinks = Sinks(config, place(alone), rows(1, 2), pytest.fail)
    for row in rows(3, 4):
        sinks.write(row)
    sinks.summary(RESULTS)
    sinks.close()
    name = f"small-tiny-{token(alone)}"
    logs = storage.SQLiteStorage.get_logs("of-a-test", name)
    assert [(row["step"], row["loss"]) for row in logs if "loss" in row] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    assert [{k: row[k] for k in RESULTS} for row in logs if "artifact/loss" in row] == [RESULTS]
    assert storage.SQLiteStorage.get_runs("of-a-test") == [name]


# What is refused before anything runs


def test_refuses_what_are_no_sinks():
    with pytest.raises(ConfigError, match=r"log.sinks: got 'mlflow', expected any of tensorboard, wandb, trackio"):
        LogConfig(sinks=("mlflow",))
    with pytest.raises(ConfigError, match=r"log.sinks: got wandb, wandb, expected each once"):
        LogConfig(sinks=("wandb", "wandb"))


@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("trackio", "trackio")]
)
def test_refuses_a_sink_that_is_not_installed(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"'{package}', which is not installed; pip install 'lmeff\[{name}\]'"):
        check(LogConfig(sinks=(name,), offline=True))


class FakeWandB:
    """As much of wandb as is asked before a run, and of a run that W&B has so many steps of."""

    def __init__(self, mode, key, steps=0):
        self.mode, self.key, self.asked = mode, key, []
        self.step, self.summary, self.logged = steps + 1, {}, []

    def Settings(self, **settings):
        return settings

    def init(self, **options):
        self.options = options
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.logged.append("finished")

    def setup(self):
        return self

    @property
    def settings(self):
        return self

    def login(self, **options):
        self.asked.append(options)
        return self.key


@pytest.mark.parametrize(
    ("mode", "offline", "key", "refused"),
    [
        ("online", False, False, True),
        ("online", False, True, False),
        ("online", True, False, False),
        ("offline", False, False, False),
        ("disabled", False, False, False),
    ],
    ids=["no key", "a key", "offline by the config", "offline by WANDB_MODE", "disabled"],
)
def test_wandb_is_asked_for_a_key_only_where_it_uploads(monkeypatch, mode, offline, key, refused):
    wandb = FakeWandB(mode, key)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = LogConfig(sinks=("wandb",), offline=offline)
    if refused:
        with pytest.raises(
            ConfigError, match=r"log.sinks: wandb has no API key here.*`wandb login`, or set --log.offline"
        ):
            check(config)
    else:
        check(config)
    assert wandb.asked == ([{"prompt": False, "verify": False}] if mode == "online" and not offline else [])


def test_wandb_online_goes_on_after_its_last_step(monkeypatch, tmp_path):
    """A run that was killed at step 3 and goes on after step 2: W&B has step 3, and takes no step twice."""
    wandb = FakeWandB("online", True, steps=3)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    left = tmp_path / "wandb" / f"offline-run-1-small-tiny-{token(tmp_path)}"
    left.mkdir(parents=True)
    sinks = Sinks(LogConfig(sinks=("wandb",), project="ours"), place(tmp_path), rows(1, 2), pytest.fail)
    for row in rows(3, 4, 5):
        sinks.write(row)
    sinks.summary(RESULTS)
    sinks.close()
    assert wandb.logged == [
        (4, {"_timestamp": 1e9 + 4, "loss": 2.0}),
        (5, {"_timestamp": 1e9 + 5, "loss": 2.5}),
        "finished",
    ]
    assert wandb.summary == RESULTS
    told = {name: wandb.options[name] for name in ("project", "group", "name", "id", "resume", "mode", "dir", "config")}
    assert told == {
        "project": "ours",
        "group": "small",
        "name": "small/tiny",
        "id": f"small-tiny-{token(tmp_path)}",
        "resume": "allow",
        "mode": "online",
        "dir": str(tmp_path),
        "config": CONFIG,
    }
    assert left.exists()  # what was not uploaded yet is not for an uploading run to delete


def test_refuses_a_trackio_elsewhere(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", FakeWandB("", True))
    check(LogConfig(sinks=("trackio",)))
    monkeypatch.setenv("TRACKIO_SPACE_ID", "somebody/space")
    with pytest.raises(ConfigError, match=r"trackio with TRACKIO_SPACE_ID set, expected its local store.*trackio sync"):
        check(LogConfig(sinks=("trackio",)))


def test_a_run_keeps_its_name(tmp_path):
    assert token(tmp_path / "a") == token(tmp_path / "a")
    assert token(tmp_path / "a") != token(tmp_path / "b")
    assert len(token(tmp_path / "a")) == 8
