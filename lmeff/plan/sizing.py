"""How large a model and how many tokens a budget of FLOPs is best spent on, and what a teacher adds.

Two laws. About 20 tokens a parameter, whatever the budget (Hoffmann et al. 2022, https://arxiv.org/abs/2203.15556, approaches 1 and 2). And the loss as a
function of both, `E + A / N^alpha + B / D^beta` (approach 3), with the constants that the paper gives or with those of Besiroglu et al. 2024
(https://arxiv.org/abs/2404.10102), who fitted its data again and found the first ones wrong. Both are for dense models, one epoch, and these papers' data.
"""

import math
from typing import NamedTuple


class Law(NamedTuple):
    """Loss in nats a token of N parameters trained on D tokens: `E + A / N^alpha + B / D^beta`."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, n_params: float, n_tokens: float) -> float:
        """The loss.

        >>> round(HOFFMANN.loss(70e9, 1.4e12), 3)
        1.937
        >>> round(BESIROGLU.loss(70e9, 1.4e12), 3)
        1.974
        """
        return self.E + self.A / n_params**self.alpha + self.B / n_tokens**self.beta


HOFFMANN = Law(1.69, 406.4, 410.7, 0.34, 0.28)  # appendix D.3, rounded there
BESIROGLU = Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658)


class Sizing(NamedTuple):
    """A model and its data."""

    parameters: float
    tokens: float

    @property
    def flops(self) -> float:
        """To train it, 6ND."""
        return 6 * self.parameters * self.tokens

    @property
    def tokens_per_parameter(self) -> float:
        """D / N."""
        return self.tokens / self.parameters


def compute_optimal(flops: float, law: Law = BESIROGLU) -> Sizing:
    """The least loss of a law that 6ND = `flops` can have: N = G (C / 6)^(beta / (alpha + beta)) with G = (alpha A / (beta B))^(1 / (alpha + beta)).

    Chinchilla's budget. The refitted law agrees with the model that was trained, 70B on 1.4T; the rounded constants of the paper ask for half of it.

    >>> [f"{x:.3g}" for x in compute_optimal(5.76e23)]
    ['7.22e+10', '1.33e+12']
    >>> [f"{x:.3g}" for x in compute_optimal(5.76e23, HOFFMANN)]
    ['3.22e+10', '2.98e+12']
    """
    both = law.alpha + law.beta
    parameters = (law.alpha * law.A / (law.beta * law.B)) ** (1 / both) * (flops / 6) ** (law.beta / both)
    return Sizing(parameters, flops / 6 / parameters)


def by_ratio(flops: float, tokens_per_parameter: float = 20) -> Sizing:
    """A fixed number of tokens a parameter.

    >>> [f"{x:.3g}" for x in by_ratio(5.76e23)]
    ['6.93e+10', '1.39e+12']
    """
    parameters = math.sqrt(flops / (6 * tokens_per_parameter))
    return Sizing(parameters, tokens_per_parameter * parameters)


def tokens_for(n_params: float, tokens_per_parameter: float = 20) -> float:
    """Tokens that a model of this size should see.

    >>> f"{tokens_for(8e9):.2g}"
    '1.6e+11'
    """
    return n_params * tokens_per_parameter


def lifetime_flops(n_params: float, n_tokens: float, served_tokens: float) -> float:
    """Training and then serving so many tokens: 6ND + 2N x served (Sardana et al. 2024, https://arxiv.org/abs/2401.00448). Why small models are trained past
    the compute optimum.

    >>> lifetime_flops(1e9, 20e9, 60e9) / lifetime_flops(1e9, 20e9, 0)
    2.0
    """
    return 6 * n_params * n_tokens + 2 * n_params * served_tokens


class Distillation(NamedTuple):
    """FLOPs of one student: its own training, and its part of the teacher's forward passes."""

    student: float
    teacher: float

    @property
    def times(self) -> float:
        """Over training the student alone."""
        return (self.student + self.teacher) / self.student


def distillation(
    student: float, teacher: float, tokens: float, *, epochs: int = 1, students: int = 1, cached: bool = False
) -> Distillation:
    """A student of so many parameters taught by a teacher of so many: 6ND for one, 2ND for the other.

    tokens: distinct ones; each student sees them `epochs` times.
    cached: the teacher's logits are stored (`logits_bytes`), so it runs once for all epochs and students; otherwise in every step of each.

    A teacher of three times the size doubles the cost; cached, for 2 students of 5 epochs, it adds a tenth of that.

    >>> distillation(1e9, 3e9, 20e9).times
    2.0
    >>> distillation(1e9, 3e9, 20e9, epochs=5, students=2, cached=True).times
    1.1
    """
    runs = 1 / students if cached else epochs
    return Distillation(6.0 * student * tokens * epochs, 2.0 * teacher * tokens * runs)


def logits_bytes(tokens: float, kept: int, *, value_bytes: int = 2, index_bytes: int = 4) -> float:
    """A cache of the teacher's `kept` largest logits of each token, with their indices.

    >>> logits_bytes(1e9, 64) / 1e9  # GB
    384.0
    """
    return tokens * kept * (value_bytes + index_bytes)
