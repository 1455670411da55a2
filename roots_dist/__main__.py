"""`python -m roots_dist ...` is `roots ...`: what torchrun, deepspeed, mpirun and srun start."""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 # before anything is imported that an older Python cannot read
    sys.exit(f"✗ Python {sys.version.split()[0]}: expected 3.10 or later. Fix: use python3.11 -m roots_dist, say.")

from roots_dist.cli.main import main

if __name__ == "__main__":
    main()
