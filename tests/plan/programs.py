"""The train step of a planned job, compiled for devices that may not be here."""

import jax

from lmeff.core.specs import abstract
from lmeff.distill.objectives import Projection, head_objective
from lmeff.models.transformer import param_specs
from lmeff.parallel.compressed import make_reducer
from lmeff.parallel.mesh import make_layout, shardings
from lmeff.train.loop import compile_step
from lmeff.train.optim import make_optimizer
from lmeff.train.runtime import Frozen, Model, Runtime
from lmeff.train.state import abstract_batch, abstract_state


def runtime(job, devices):
    """Everything static of the job's step on these devices."""
    recipe, teacher, specs = job.student.recipe, job.teacher, param_specs(job.cfg)
    taught = teacher and (Model(teacher.cfg, teacher.recipe.numerics), Projection(teacher.cfg, teacher.recipe.numerics))
    return Runtime(
        student=Model(job.cfg, recipe.numerics, recipe.compression.apply),
        teacher=taught and taught[0],
        specs=specs,
        compression=recipe.compression,
        objective=head_objective(Projection(job.cfg, recipe.numerics), taught and taught[1], job.distill),
        tx=make_optimizer(job.optim, job.steps, policy=job.policy, specs=specs),
        layout=make_layout(job.mesh, devices),
        policy=job.policy,
        accumulate=job.accumulate,
        remat=job.policy_of_remat,
        ema=job.optim.ema,
        offload=job.optim.offload,
        reducer=make_reducer(job.reduce, specs),
        local=job.local,
        steps=job.steps,
    )


def arguments(job, devices):
    """(state, batch, frozen) of the step as shapes with shardings."""
    rt = runtime(job, devices)
    state = abstract_state(
        rt.specs, rt.compression, rt.tx, rt.layout, dtype=job.policy.params, ema=rt.ema is not None, offload=rt.offload
    )
    frozen = Frozen()
    if job.teacher is not None:
        specs = param_specs(job.teacher.cfg)
        shapes = abstract(specs, job.policy.params)
        places = shardings(shapes, specs, rt.layout)
        frozen = Frozen(
            teacher=jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)
        )
    return state, abstract_batch(job.rows, job.tokens, rt.layout), frozen


def memory(job, devices=None):
    """What the compiler says of the step's memory on one device."""
    devices = devices or jax.devices()[: job.devices]
    # Other tests ask for the highest precision, which a kernel of bfloat16 products cannot have.
    with jax.default_matmul_precision("default"):
        return compile_step(runtime(job, devices), *arguments(job, devices)).memory_analysis()
