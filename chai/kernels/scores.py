"""Parts of all attention kernels: products, scores, and what hides keys from queries."""

from __future__ import annotations

from typing import Any

from chai.kernels.compiler import INSTALLED, is_interpreted, tl, triton

#: Kinds of mask: none, bool (true: attend), or floats that are added to the scores.
NO_MASK, BOOL_MASK, ADDITIVE_MASK = 0, 1, 2

#: exp(x) = exp2(x * LOG2_E): the GPU computes powers of two.
LOG2_E: Any = tl.constexpr(1.4426950408889634) if INSTALLED else None
#: Score of a hidden key: finite, so that a query that sees nothing has a finite output.
HIDDEN: Any = tl.constexpr(-1.0e30) if INSTALLED else None
#: Whether products are computed in fp32: the interpreter multiplies the bits of bfloat16.
WIDEN: Any = tl.constexpr(is_interpreted()) if INSTALLED else None


@triton.jit
def dot(left, right, acc):
    """Return ``left @ right + acc``; in fp32 if ``acc`` and both inputs are, not in TF32."""
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit
def scale_scores(scores, scaling, softcap, CAP: tl.constexpr):
    """Multiply scores with their factor, bound them if there is a soft cap, and pass to powers of two."""
    if CAP:
        # softcap * tanh(x), with tanh(x) = 1 - 2 / (1 + exp(2 x)).
        twice = tl.math.exp2(scores * (2.0 * LOG2_E * scaling / softcap))
        return (softcap * LOG2_E) * (1.0 - 2.0 / (1.0 + twice))
    else:
        return scores * (scaling * LOG2_E)


@triton.jit
def apply_mask(scores, mask, visible, KIND: tl.constexpr):
    """Hide keys that are not ``visible`` or that the mask hides; ``mask`` are pointers of the shape of the scores."""
    if KIND == 1:
        visible = visible & (tl.load(mask, mask=visible, other=0) != 0)
    if KIND == 2:
        scores += tl.maximum(tl.load(mask, mask=visible, other=0.0).to(tl.float32), HIDDEN) * LOG2_E
    return tl.where(visible, tl.maximum(scores, HIDDEN), HIDDEN)
