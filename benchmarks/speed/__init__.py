"""What balancing costs: ``python -m benchmarks.speed``, or ``make bench``.

Each part of the page is one module with `TITLE`, `run(settings)`, `section(results)` and
`figures(results)`:

- `step_cost`: time of a step, compared with the plain loop and with other libraries.
- `memory`: peak memory of a step, and the elements held while weights are computed.
- `growth`: time and memory against the number of losses and of parameters.
- `solvers`: time and accuracy of computing weights from a Gramian.
- `two_ranks`: time that two processes add by averaging gradients.
- `profiling`: share of each phase in a step.
- `import_time`: what ``import moo_balance`` adds to ``import torch``.

They are made of

- `workloads`: the models, and the losses of one batch.
- `implementations`: ways to take a step: the plain loop, the limit, ours; `peers`: other libraries.
- `timing`: interleaved timing; `counts`: counted elements, synchronizations and kernels;
  `processes`: fresh processes.
- `goals`, `readings`: bounds on the results, and how to read the figures from the results.
- `page`, `tables`: the page, its tables and plots; `results/`: the figures as JSON, by device.

`instructions` is a command of its own: it counts a step's instructions under valgrind.
"""
