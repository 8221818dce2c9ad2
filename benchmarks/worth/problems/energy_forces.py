"""A small neural network potential, fitted to energies, forces and stresses of a crystal.

The labels are those of a Lennard-Jones solid with the parameters of copper (Halicioglu & Pound
1975), smoothly cut off at 5 Å: two fcc cells side by side, 8 atoms, strained and rattled at random.
The network is of Behler and Parrinello's kind (2007): radial symmetry functions of each atom's
surroundings, a perceptron for its energy, and forces and stress as derivatives of the total energy.
The derivatives of the symmetry functions are computed once, as is usual for such networks.

The losses are the mean squared errors of the energy per atom (eV), of the force components (eV/Å)
and of the stress components (eV/Å³). The energies are counted from the mean of the training set.
The score is the geometric mean of the three mean absolute errors on held-out configurations, each
as a fraction of the standard deviation of its labels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import jvp

from benchmarks.worth.problem import Problem, Training

NAMES = ("energy", "forces", "stress")
EPSILON, SIGMA = 0.4093, 2.338  # eV, Å
LATTICE = 3.61  # Å
CUTOFF = 5.0  # Å
STRAIN, RATTLE = 0.02, 0.05  # standard deviations; the latter in Å
FUNCTIONS = 8
TRAINING, VALIDATION, TEST = 200, 100, 200
CONFIGURATIONS = TRAINING + VALIDATION + TEST
ATOMS = 8
WIDTH = 32
BATCH = 16


class Crystals(NamedTuple):
    """Configurations: symmetry functions, their derivatives, and the labels."""

    functions: Tensor  # configuration, atom, function
    derivatives: Tensor  # configuration, atom and function, 3 coordinates an atom and 9 strains
    volume: Tensor
    energy: Tensor  # of an atom
    forces: Tensor  # configuration, component
    stress: Tensor

    def take(self, index: Tensor) -> Crystals:
        return Crystals(*(part[index] for part in self))


class Pairs(NamedTuple):
    """Ordered pairs of atoms closer than the cutoff, in all configurations."""

    arrow: Tensor  # from the first to the second
    first: Tensor  # counted through all configurations
    second: Tensor  # counted in its configuration


def switch(r: Tensor) -> Tensor:
    return 0.5 + 0.5 * torch.cos(torch.pi * r / CUTOFF)


def lennard_jones(r: Tensor) -> Tensor:
    """The energy of each ordered pair, half of that of the pair."""
    sixth = (SIGMA / r) ** 6
    return 2 * EPSILON * (sixth**2 - sixth) * switch(r)


def symmetry_functions(r: Tensor) -> Tensor:
    """Gaussians of each pair's distance, the last dimension; their sums describe an atom."""
    centres = torch.linspace(2.0, CUTOFF, FUNCTIONS, dtype=r.dtype)
    width = (CUTOFF - 2.0) / (FUNCTIONS - 1)
    return torch.exp(-0.5 * ((r[:, None] - centres) / width) ** 2) * switch(r)[:, None]


def sum_over_pairs(
    pair_function: Callable[[Tensor], Tensor], pairs: Pairs
) -> tuple[Tensor, Tensor]:
    """Sum a function of each pair's distance over the pairs of each atom.

    Returns:
        The sums (configuration, atom, function), and their derivatives by the coordinates of the
        atoms and by the nine strains (configuration, atom, function, coordinate).
    """
    r = pairs.arrow.norm(dim=1)
    value, slope = jvp(pair_function, (r,), (torch.ones_like(r),))
    count = value.shape[1]
    by_arrow = slope[:, :, None] * (pairs.arrow / r[:, None])[:, None, :]
    by_strain = (by_arrow[..., None] * pairs.arrow[:, None, None, :]).flatten(2)
    sums = value.new_zeros(CONFIGURATIONS * ATOMS, count).index_add_(0, pairs.first, value)
    strains = value.new_zeros(CONFIGURATIONS * ATOMS, count, 9)
    strains.index_add_(0, pairs.first, by_strain)
    positions = value.new_zeros(CONFIGURATIONS * ATOMS * ATOMS, count, 3)
    positions.index_add_(0, pairs.first * ATOMS + pairs.second, by_arrow)
    positions.index_add_(0, pairs.first * ATOMS + pairs.first % ATOMS, -by_arrow)
    positions = positions.view(-1, ATOMS, count, 3).transpose(1, 2).flatten(2)
    derivatives = torch.cat([positions, strains], dim=2)
    return sums.unflatten(0, (-1, ATOMS)), derivatives.unflatten(0, (-1, ATOMS))


def make_crystals() -> tuple[Pairs, Tensor]:
    """The pairs of strained and rattled crystals, and the volumes of their cells."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(CONFIGURATIONS, *shape, generator=generator, dtype=torch.float64)

    fcc = torch.tensor([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    sites = LATTICE * torch.cat([fcc, fcc + torch.tensor([1.0, 0, 0])]).double()
    edges = LATTICE * torch.diag(torch.tensor([2.0, 1.0, 1.0])).double()
    deformation = torch.eye(3) + STRAIN * normal(3, 3)
    edges = edges @ deformation
    positions = sites @ deformation + RATTLE * normal(ATOMS, 3)
    images = torch.cartesian_prod(*(torch.arange(-n, n + 1.0) for n in (1, 2, 2))).double()

    arrows = positions[:, None, :, None] - positions[:, :, None, None]
    arrows = arrows + (images @ edges)[:, None, None]
    distances = arrows.norm(dim=4)
    near = (distances < CUTOFF) & (distances > 0)
    configuration, first, second, _ = near.nonzero(as_tuple=True)
    return Pairs(arrows[near], configuration * ATOMS + first, second), torch.linalg.det(edges)


@functools.cache
def splits() -> tuple[Crystals, Crystals, Crystals]:
    """Training, validation and test configurations, the same for every seed."""
    pairs, volume = make_crystals()
    functions, derivatives = sum_over_pairs(symmetry_functions, pairs)
    energies, slopes = sum_over_pairs(lambda r: lennard_jones(r)[:, None], pairs)
    total = slopes.sum(dim=(1, 2))
    mean = functions[:TRAINING].mean(dim=(0, 1))
    deviation = functions[:TRAINING].std(dim=(0, 1))
    energy = energies.mean(dim=(1, 2))
    crystals = Crystals(
        functions=(functions - mean) / deviation,
        derivatives=(derivatives / deviation[:, None]).flatten(1, 2),
        volume=volume,
        energy=energy - energy[:TRAINING].mean(),
        forces=-total[:, :-9],
        stress=total[:, -9:] / volume[:, None],
    )
    crystals = Crystals(*(part.float() for part in crystals))
    index = torch.arange(CONFIGURATIONS)
    training, validation, test = index.tensor_split((TRAINING, TRAINING + VALIDATION))
    return crystals.take(training), crystals.take(validation), crystals.take(test)


def start(seed: int) -> Training:
    training, validation, test = splits()
    model = nn.Sequential(
        nn.Linear(FUNCTIONS, WIDTH),
        nn.Tanh(),
        nn.Linear(WIDTH, WIDTH),
        nn.Tanh(),
        nn.Linear(WIDTH, 1),
    )

    def predict(crystals: Crystals, training: bool) -> tuple[Tensor, Tensor, Tensor]:
        functions = crystals.functions.detach().requires_grad_()
        energies = model(functions).squeeze(2)
        (slopes,) = torch.autograd.grad(energies.sum(), functions, create_graph=training)
        total = torch.bmm(slopes.flatten(1)[:, None], crystals.derivatives).squeeze(1)
        return energies.mean(dim=1), -total[:, :-9], total[:, -9:] / crystals.volume[:, None]

    def losses(batch: Crystals) -> dict[str, Tensor]:
        energy, forces, stress = predict(batch, training=True)
        return {
            "energy": (energy - batch.energy).square().mean(),
            "forces": (forces - batch.forces).square().mean(),
            "stress": (stress - batch.stress).square().mean(),
        }

    def error(crystals: Crystals) -> float:
        product = 1.0
        for name, predicted in zip(NAMES, predict(crystals, training=False), strict=True):
            labels = getattr(crystals, name)
            product *= float((predicted.detach() - labels).abs().mean() / labels.std())
        return product ** (1 / len(NAMES))

    return Training(
        list(model.parameters()),
        draw=lambda: training.take(torch.randint(TRAINING, (BATCH,))),
        losses=losses,
        validate=lambda: error(validation),
        test=lambda: error(test),
    )


PROBLEM = Problem(
    title="A potential for energies, forces and stresses of a crystal",
    score="geometric mean of the three mean absolute errors, relative to the labels' deviations",
    start=start,
    loss_names=NAMES,
    primary="forces",
    steps=300,
    rates=(6e-3, 2e-2, 6e-2),
    trivial=0.7,
)
