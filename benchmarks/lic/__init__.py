"""Experiments on learned image compression, and the page docs/lic_report.md.

====================================  ==============================================================
experiments                           one in each module: which runs there are, what they say
regime                                what all share: the codecs at the start, how runs are trained
jobs                                  what a job is: train and score, refine, code with JPEG
store, engine                         results by all they depend on; carries out what is missing
estimator                             the difference of two codecs in per cent of the rate
weightings, cautious_adam, roundings  methods that only experiments use
scores                                what is scored, and figures of it
page, figures                         the page, from stored summaries only
====================================  ==============================================================
"""
