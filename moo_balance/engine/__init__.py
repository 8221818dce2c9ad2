"""How per-loss gradients are taken from autograd, and how they become a Gramian and ``.grad``.

An engine gets a `Problem` (K losses, P parameters) and gives a `Linearization`. One step:

    losses [K] --engine.linearize--> linearization
                                          | .gramian()
                                          v
                 autograd.grad of every loss (per_loss): K rows of P gradients each
                                          v
                 blocks of parameters that the same losses reach (jacobian)
                                          v
                 inner products, block by block (products) --> Gramian [K, K]
                                          :
                 a method turns the Gramian into coefficients [K]
                                          :
                                          | .add_to_grad(coefficients)
                                          v
                 coefficients[0] * row 0 + ... --> .grad of every parameter

Without a call of `gramian`, `add_to_grad` is one ordinary backward pass of the weighted sum (base).
`combined(coefficients)` gives the weighted sum as a scalar with the weighted gradient.

What is kept in memory between the two calls, for a large weight W, small parameters a and b that
all losses reach, and a parameter h that only loss 1 reaches:

    loss 0    | W_0 |    | a_0 b_0 |             W    one tensor per loss, as autograd gave it,
    loss 1    | W_1 |    | a_1 b_1 |    | h_1 |       or factors, in some linear layers (linear)
    loss 2    | W_2 |    | a_2 b_2 |             a b  copied into one matrix [K, size]

Other ways: losses that share features are differentiated down to these (features); `Streaming`
keeps the K gradients of a few layers at a time (streaming/). Several processes average rows while
the next loss is differentiated (distributed). One file (autograd) reads autograd's graph and holds
every private name of PyTorch, except `torch._foreach_*`, on which torch.optim is built.
"""

from moo_balance.engine.base import (
    Engine as Engine,
    Linearization as Linearization,
    Problem as Problem,
    Window as Window,
)
from moo_balance.engine.per_loss import PerLoss as PerLoss
from moo_balance.engine.streaming import Streaming as Streaming

__all__ = ["Engine", "Linearization", "PerLoss", "Problem", "Streaming", "Window"]
