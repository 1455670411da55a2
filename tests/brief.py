"""What the forkserver of the tests' worlds imports last, for all that it forks: nobody waits for numbers that no test
reads, and no line says that a busy machine is slow."""

from roots_dist import logs
from roots_dist.runs.plan import at_start
from roots_dist.runs.train import banner

logs.FIRST_S = 600.0
banner.PEAK_S = 0.02  # of the half second in which every run measures its processor
at_start.LIMIT_S = 0.0  # of the third of a second in which every run plans its memory
