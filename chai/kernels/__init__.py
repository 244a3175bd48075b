"""GPU kernels in Triton, each tested against the equations in :mod:`chai.attention.reference`.

Triton is optional (``pip install chai-attention[gpu]``; CUDA builds of torch bring it). Modules of this package can be
imported without it; :func:`available` says whether their kernels can run.
"""

from chai.kernels.compiler import available, is_interpreted

__all__ = ["available", "is_interpreted"]
