"""What is learned. OBJECTIVES maps objective.name to a class that says which window of the corpus a sample is, makes
tokens and targets of it as a pure function of (seed, sample number), and counts the scored targets of a microbatch."""

from roots_dist.objectives.clm import CausalTokens

OBJECTIVES = {"clm": CausalTokens}
