"""The mathematics of balancing: tensors in, tensors out, no state and no autograd.

Every function takes any floating dtype, computes in float32 at least, and returns float32 at least.
"""

from moo_balance.functional.analytic_qp import analytic_qp_weights
from moo_balance.functional.dual_cone import project_dual_cone
from moo_balance.functional.equal_projections import equal_projections
from moo_balance.functional.fair import fair_weights
from moo_balance.functional.gramian import cosine_similarity, regularize
from moo_balance.functional.lengths import rescale
from moo_balance.functional.min_norm import kkt_residual, min_norm_weights
from moo_balance.functional.scaling import gradient_scales, scale_gramian
from moo_balance.functional.set_tchebycheff import set_tchebycheff, set_tchebycheff_value
from moo_balance.functional.simplex import project_simplex
from moo_balance.functional.tchebycheff import (
    smooth_tchebycheff,
    smooth_tchebycheff_log,
    smooth_tchebycheff_log_value,
    smooth_tchebycheff_value,
    tchebycheff,
    tchebycheff_value,
)

__all__ = [
    "analytic_qp_weights",
    "cosine_similarity",
    "equal_projections",
    "fair_weights",
    "gradient_scales",
    "kkt_residual",
    "min_norm_weights",
    "project_dual_cone",
    "project_simplex",
    "regularize",
    "rescale",
    "scale_gramian",
    "set_tchebycheff",
    "set_tchebycheff_value",
    "smooth_tchebycheff",
    "smooth_tchebycheff_log",
    "smooth_tchebycheff_log_value",
    "smooth_tchebycheff_value",
    "tchebycheff",
    "tchebycheff_value",
]
