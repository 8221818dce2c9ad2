"""Balance inside NequIP: its module, losses, scheduler and logging, with our coefficients.

Copper clusters of six atoms, rattled at random, with energies and forces of ASE's effective medium
theory, and a small NequIP model. NequIP adds its losses with fixed coefficients, which its callback
`SoftAdapt` may change; here another callback puts `combined_loss` in the place of that sum.
Compared are the mean absolute errors on test clusters.

    pip install nequip
    python -m examples.recipes.nequip_potential --figure potential.svg
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from examples.recipes import common
from moo_balance import BalancedOptimizer

try:
    from ase.calculators.emt import EMT
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.cluster import Octahedron
    from hydra.utils import instantiate
    from lightning.pytorch import Callback, Trainer
    from nequip.data import AtomicDataDict, from_ase
    from nequip.data.transforms import ChemicalSpeciesToAtomTypeMapper, NeighborListTransform
    from nequip.train import NequIPLightningModule
    from nequip.train.callbacks import SoftAdapt
    from nequip.utils.global_state import set_global_state

    from examples.recipes._lightning import QUIET, Recorder, silence, step_times_of_runs
    from moo_balance.integrations.lightning import combined_loss
except ModuleNotFoundError as error:
    raise common.missing_package(error, "pip install nequip") from error

ATOMS, CUTOFF, RATTLE = 6, 4.0, 0.15  # the last two in Å
TRIALS = (0.1, 10.0, 100.0)  # coefficients of the energy; NequIP's default, 1, is one more trial
COUNTS = {"train": 40, "test": 100}


class BalancedAdam(BalancedOptimizer):
    """Adam that balances, as NequIP makes its optimizer: from parameters and a configuration."""

    def __init__(self, params: Iterable[Tensor], weighting: Any, **settings: Any) -> None:
        super().__init__(torch.optim.Adam(params, **settings), instantiate(weighting))


class Balance(Callback):
    """In the place of `SoftAdapt`: the weighted sum of the losses is that of the optimizer."""

    def on_train_start(self, trainer: Trainer, module: NequIPLightningModule) -> None:
        def balance(loss: nn.Module, inputs: tuple, values: dict[str, Tensor]) -> dict[str, Tensor]:
            key = next(key for key in values if key.endswith("weighted_sum"))
            prefix = key.removesuffix("weighted_sum")
            weighted = [name for name, entry in loss.entries.items() if entry.coeff is not None]
            losses = {name: values[prefix + name] for name in weighted}
            return {**values, key: combined_loss(module, losses)}

        self.handle = module.loss.register_forward_hook(balance)

    def on_train_end(self, *_: object) -> None:
        self.handle.remove()

    on_exception = on_train_end


class Method(NamedTuple):
    energy: float = 1.0  # the coefficient of its loss; that of the forces is 1
    callback: Callable[[], Callback] | None = None
    weighting: str | None = None


class Run(NamedTuple):
    energy: float  # meV/atom
    forces: float  # meV/Å
    recorder: Recorder


@cache
def make_clusters() -> dict[str, list[AtomicDataDict.Type]]:
    generator = torch.Generator().manual_seed(0)
    to_type = ChemicalSpeciesToAtomTypeMapper(model_type_names=["Cu"])
    add_neighbours = NeighborListTransform(r_max=CUTOFF)

    def make() -> AtomicDataDict.Type:
        atoms = Octahedron("Cu", 2)
        atoms.positions += RATTLE * torch.randn(ATOMS, 3, generator=generator).numpy()
        atoms.calc = EMT()
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        return add_neighbours(to_type(from_ase(atoms)))

    return {name: [make() for _ in range(count)] for name, count in COUNTS.items()}


def make_module(method: Method, seed: int, epochs: int) -> NequIPLightningModule:
    train = make_clusters()["train"]
    energies = torch.cat([cluster["total_energy"] for cluster in train])
    forces = torch.cat([cluster["forces"] for cluster in train])
    model = {
        "_target_": "nequip.model.NequIPGNNModel",
        **{"seed": seed, "model_dtype": "float32", "type_names": ["Cu"], "r_max": CUTOFF},
        **{"num_layers": 2, "num_features": 8, "l_max": 1, "parity": False, "radial_mlp_width": 16},
        "avg_num_neighbors": ATOMS - 1.0,
        "per_type_energy_shifts": float(energies.mean() / ATOMS),
        "per_type_energy_scales": float(forces.square().mean().sqrt()),
    }
    optimizer = {"_target_": "torch.optim.Adam", "lr": 1e-2}
    if method.weighting:
        optimizer["_target_"] = "examples.recipes.nequip_potential.BalancedAdam"
        optimizer["weighting"] = {"_target_": f"moo_balance.{method.weighting}"}
    cosine = {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": epochs}
    coefficients = {"total_energy": method.energy, "forces": 1.0}
    return NequIPLightningModule(
        model=model,
        num_datasets={"train": 1, "val": 0, "test": 1, "predict": 0},
        optimizer=optimizer,
        lr_scheduler={"scheduler": cosine, "interval": "epoch"},
        loss={"_target_": "nequip.train.EnergyForceLoss", "coeffs": coefficients},
        test_metrics={"_target_": "nequip.train.EnergyForceMetrics"},
    )


def train(method: Method, seed: int, epochs: int) -> Run:
    module = make_module(method, seed, epochs)
    torch.manual_seed(seed)
    data = make_clusters()
    collate = AtomicDataDict.batched_from_list
    recorder = Recorder()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[recorder, *([method.callback()] if method.callback else [])],
        **QUIET,
        inference_mode=False,  # forces are gradients in the test, too
    )
    trainer.fit(module, DataLoader(data["train"], 5, shuffle=True, collate_fn=collate))
    trainer.test(module, DataLoader(data["test"], 50, collate_fn=collate), verbose=False)
    errors = trainer.callback_metrics
    energy, forces = (errors[f"test0_epoch/{key}_mae"] for key in ("per_atom_energy", "forces"))
    return Run(1000 * float(energy), 1000 * float(forces), recorder)


def draw(run: Run, runs: dict[str, list[Run]], path: Path) -> None:
    figure, ((losses, coefficients, errors),) = common.make_axes(1, 3)
    common.draw_history(run.recorder.history, losses, coefficients, "NashMTL")
    for colour, (name, each) in zip(common.COLOURS, runs.items(), strict=False):
        energy, forces, _ = zip(*each, strict=True)
        errors.plot(energy, forces, "o", color=colour, markersize=4, label=name)
    errors.set(xlabel="energy, meV/atom", ylabel="forces, meV/Å", title="test errors")
    errors.set(xscale="log", yscale="log")
    for axis in (errors.xaxis, errors.yaxis):
        common.use_few_ticks(axis)
    for axes, place in ((losses, "upper right"), (coefficients, "lower left")):
        axes.legend(loc=place)
    errors.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    common.save_figure(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    args = common.parse(__doc__, arguments)
    silence()
    set_global_state()  # NequIP's: double precision outside of the model
    epochs = 1 if args.quick else 25
    trials = {f"energy {value:g}": Method(value) for value in TRIALS}
    scores = {name: train(each, args.seed, epochs) for name, each in trials.items()}
    best = min(scores, key=lambda name: scores[name].energy * scores[name].forces)
    methods = {
        "energy 1": Method(),
        best: trials[best],
        "SoftAdapt": Method(callback=partial(SoftAdapt, 1.1, "epoch", 5)),  # as it is documented
        "GradientNorms": Method(callback=Balance, weighting="GradientNorms"),
        "NashMTL": Method(callback=Balance, weighting="NashMTL"),
    }
    runs = {name: [train(each, s, epochs) for s in args.seeds] for name, each in methods.items()}
    short = {
        name: lambda each=each: train(each, args.seed, 1).recorder for name, each in methods.items()
    }
    times = step_times_of_runs(short, rounds=1 if args.quick else 6)
    errors = {name: [run[:2] for run in each] for name, each in runs.items()}
    header = ["method", "energy, meV/atom", "forces, meV/Å", "time of a step"]
    common.print_scores(header, errors, times)
    if args.figure:
        draw(runs["NashMTL"][0], runs, args.figure)


if __name__ == "__main__":
    main()
