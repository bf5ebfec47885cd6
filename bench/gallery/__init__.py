"""Four small programs, each with its picture: `python -m bench.gallery` makes them all, on any machine.

Each module has `compute`, which makes a signal from a seed and convolves it, and `draw`, which draws what came out.
"""
