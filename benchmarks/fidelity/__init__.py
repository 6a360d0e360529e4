"""Whether the answers stay: tasks answered dense and sparse, counted with intervals.

python -m benchmarks.fidelity --help        (from the repository root; see docs/fidelity.md)
"""
