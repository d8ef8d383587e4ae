"""What is planned of a config: its training stages, with what each inherits."""

from pathlib import Path

from lmeff.config.files import load_experiment
from lmeff.plan.job import jobs

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.py"


def test_a_job_for_every_stage_that_trains_with_its_teacher_and_transforms():
    experiment = load_experiment(QUICKSTART)
    found = {job.name: job for job in jobs(experiment, 2, "tpu")}
    assert list(found) == [stage.name for stage in experiment.recipe if experiment.steps(stage)]
    student = found["student"]
    assert student.teacher is not None
    assert student.teacher.cfg == found["teacher"].cfg
    assert student.cfg != student.teacher.cfg
    assert [type(t).__name__ for t in found["all-three"].student.recipe.transforms] == ["Prune", "Quantize"]
    assert found["teacher"].layout.platform == "tpu"
    assert len({*found.values()}) == len(found)  # hashable, all different
