"""What a schedule costs, by counting its table."""

from typing import NamedTuple

import numpy as np

from lmeff.parallel.program import LOCAL, NOWHERE, SlotCounts, compile_schedule
from lmeff.parallel.tables import IDLE, B, F, Schedule, W


class Simulation(NamedTuple):
    """Counts of one step. Arrays are [stages]; "slices" are (microbatch, chunk), each a 1/chunks of a stage.

    ticks:            the length of the step.
    idle:             idle ticks.
    idle_inside:      idle ticks between a stage's first and last operation.
    idle_share:       idle share of all ticks of all stages.
    in_flight:        the most slices whose F is done and whose W is not; an F counts from its own tick, a W to the tick before its own.
    awaiting_b:       the same from F to B.
    pending:          the same from B to W.
    activations_sent: activations that go to another stage, the whole step; what stays on a stage is not sent.
    gradients_sent:   gradients that do.
    sent_bytes:       bytes of both.
    permuted_bytes:   bytes that two permutes a tick move, which also run where there is nothing to send.
    slots:            rows of the executor's buffers (stashes kept until B).
    """

    ticks: int
    idle: np.ndarray
    idle_inside: np.ndarray
    idle_share: float
    in_flight: np.ndarray
    awaiting_b: np.ndarray
    pending: np.ndarray
    activations_sent: int
    gradients_sent: int
    sent_bytes: int
    permuted_bytes: int
    slots: SlotCounts

    def to_json(self) -> dict:
        """Plain numbers and lists."""
        plain = {
            key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in self._asdict().items()
        }
        return plain | {"slots": self.slots._asdict()}


def simulate(schedule: Schedule, activation_bytes: int = 0) -> Simulation:
    """Counts a schedule. activation_bytes: bytes of one microbatch's activation between two stages; its gradient has as many."""
    program = compile_schedule(schedule)
    op, send = program.ticks.op, program.ticks.send
    busy = op != IDLE
    idle = (~busy).sum(0)
    first, last = busy.argmax(0), schedule.ticks - 1 - busy[::-1].argmax(0)
    remote = (send != NOWHERE) & (send != LOCAL)
    activations, gradients = int((remote & (op == F)).sum()), int((remote & (op == B)).sum())
    permutes = 2 * schedule.ticks * schedule.stages if schedule.stages > 1 else 0
    return Simulation(
        ticks=schedule.ticks,
        idle=idle,
        idle_inside=last - first + 1 - busy.sum(0),
        idle_share=float(idle.sum() / busy.size),
        in_flight=_peak(op, F, W),
        awaiting_b=_peak(op, F, B),
        pending=_peak(op, B, W),
        activations_sent=activations,
        gradients_sent=gradients,
        sent_bytes=(activations + gradients) * activation_bytes,
        permuted_bytes=permutes * activation_bytes,
        slots=program.slots,
    )


def _peak(op: np.ndarray, begin: int, end: int) -> np.ndarray:
    return ((op == begin).astype(int) - (op == end)).cumsum(0).max(0)
