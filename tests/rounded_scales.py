# SPDX-License-Identifier: Apache-2.0
"""How far a scale of noise may lie above what its formula says: it is rounded up to few digits."""

ROUNDED = 2.0**-23  # of σ² and b, to 24 bits: what follows from them is off by no more
CHOSEN = 2.0**-19  # of the scores in a choice, to 20 bits
SLACK = 1e-8  # conversions of budgets give away 1e-9 of ε or δ, on the private side
