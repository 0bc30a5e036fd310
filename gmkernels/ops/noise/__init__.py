"""The noise family: one kernel a distribution. The public functions are in gmkernels/noise.py."""

from gmkernels import dispatch
from gmkernels.ops.noise import reference

for _draw in (reference.normal, reference.uniform):
    dispatch.define("gmkernels_reference", _draw, reference.draw_empty)
dispatch.load_family(__name__, ("normal", "uniform"))
