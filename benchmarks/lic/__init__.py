"""Experiments on learned image compression, and the page docs/lic_report.md.

===================  ===============================================================================
study                the experiments of each setting, in order; what runs them
engine, cache        does jobs once, in order of their dependencies, with several processes
jobs                 what a job is: train a run and score it, or refine latents
tuning               learning rate, clipping and the cost of a step, before anything is compared
solutions            Solutions 1 and 2 against their baselines
ablations            the solutions with one piece changed
variable_rate        one codec for every rate
refinement           SGA and SGA+
statistics, text     intervals over seeds; numbers in text
…_page, figures      what the page shows of each experiment, from JSON only
report               the JSON file, and the page as a whole
===================  ===============================================================================

Every page module has ``section(title, data) -> str`` and ``figures(title, data)``.
"""
