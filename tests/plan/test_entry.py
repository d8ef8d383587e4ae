"""Arguments read off a program's text, as XLA writes it."""

from lmeff.plan.entry import Argument, arguments_of

TEXT = r"""HloModule jit_advance, num_partitions=4

inner (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}

ENTRY %main (a: f32[2,64,4,64]) -> f32[] {
  %a = f32[2,64,4,64]{3,2,1,0:T(4,128)} parameter(0), sharding={replicated}, metadata={op_name="state.opt[0].mu[\'wq\']"}
  %b = s32[]{:T(128)} parameter(1), metadata={op_name="state.step"}
  %c = f32[9,256]{1,0:T(8,128)S(5)} parameter(2), metadata={op_name="state.opt[0].nu"}
  %d = s4[8,100]{0,1:T(8,128)(8,1)E(4)} parameter(3)
  %e = pred[3,5]{1,0} parameter(4), metadata={op_name="state.auxiliary"}
  ROOT %r = f32[] add(%b, %b)
}
"""


def test_names_shapes_and_stored_bytes():
    assert arguments_of(TEXT) == [
        Argument("state.opt[0].mu['wq']", "f32", (2, 64, 4, 64), 2 * 64 * 4 * 128 * 4, False),
        Argument("state.step", "s32", (), 128 * 4, False),
        Argument("state.opt[0].nu", "f32", (9, 256), 16 * 256 * 4, True),
        Argument("", "s4", (8, 100), 104 * 128 // 2, False),
        Argument("state.auxiliary", "pred", (3, 5), 15, False),
    ]
