"""A study: whole curricula compared, arm by arm, world by world, seed by seed.

plan.py         from the study file to checked configurations
measure.py      what a finished curriculum measured and cost
stages.py       what each stage chose and used up
statistics.py   steps to reach, ratios, bootstrap; pure functions
compare.py      arms against the reference
tables.py       the long table, and grids for people
plots.py        the picture
output.py       all files of a study
"""
