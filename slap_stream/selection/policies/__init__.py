"""Rules that pick a batch from the pool.

registry.py  which policies there are, by name
base.py      what a policy is given, what it gives back, and what it may ask for
slap.py      the project's own
uniform.py   uniform in strata: the baseline, and what the others begin with
peers/       policies of other papers, to compare with
"""
