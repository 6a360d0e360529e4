"""``python -m benchmarks.fidelity``."""

from benchmarks.fidelity.cli import main

if __name__ == "__main__":
    main()
