"""Search on from types that a knapsack chose: prices add up to first order only, here the real thing is looked at.

An evolutionary search after EvoPress (arXiv 2410.14649): `levels` changes types within a budget, `evolve` keeps what
is better, `divergence` says how far a model in given types is from the original, `run` puts it together.
"""
