"""`python -m roots_dist ...` is `roots ...`: what torchrun, deepspeed, mpirun and srun start."""

from roots_dist.cli.main import main

if __name__ == "__main__":
    main()
