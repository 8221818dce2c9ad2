"""Evaluates the losses of a batch again after the step: from the same state, and with no trace.

evaluation     the two evaluations of a closure, and what is put back after the second
dry_runs       evaluations of many batches, all of which are undone
writes         which tensors operators write in place
copies         copies of these, each made before the first write
module_state   attributes of modules, memory and gradients of their tensors
reachable      the modules that a closure refers to
random_state   random generators
"""

from moo_balance._reevaluation.copies import KnownWrites as KnownWrites
from moo_balance._reevaluation.dry_runs import DryRuns as DryRuns
from moo_balance._reevaluation.evaluation import (
    Reevaluation as Reevaluation,
    add_losses as add_losses,
    evaluate as evaluate,
    repeat_all as repeat_all,
)
