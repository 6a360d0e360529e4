"""``python -m sparse_compiler`` is the same as ``minference``."""

from __future__ import annotations

from sparse_compiler.cli import main

if __name__ == "__main__":
    main()
