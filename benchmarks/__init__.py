"""Time and memory of moelora beside its baselines; ``python -m benchmarks list`` shows the cases.

Not part of the installed package. Nothing here has a threshold on time that fails: results are
reported. What fails is a wrong result, which is looked for before anything is timed.
"""
