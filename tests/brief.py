"""What the forkserver of the tests' worlds imports last, for all that it forks: nobody waits for numbers that no test
reads."""

from roots_dist.runs.train import banner

banner.PEAK_S = 0.02  # of the half second in which every run measures its processor
