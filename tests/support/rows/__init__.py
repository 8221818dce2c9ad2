"""The rows of the registry, one module for each family of methods."""

from tests.support.rows import (
    bargaining,
    baselines,
    coordinates,
    gradient_norms,
    log_losses,
    losses,
    min_norm,
    stochastic,
    surgery,
    targets,
    tchebycheff,
    wrappers,
)

# In the order of the manual.
FAMILIES = (
    baselines,
    log_losses,
    losses,
    tchebycheff,
    targets,
    gradient_norms,
    min_norm,
    bargaining,
    surgery,
    stochastic,
    coordinates,
    wrappers,
)
