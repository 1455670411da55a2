"""An extension with an optimizer rule that reads no key of optim but its rate: plain gradient descent."""

from roots_dist import Extension, NewOptimizer


def descent(step, weight, gradient, exp_avg, exp_avg_sq):
    weight.sub_(gradient, alpha=step.lr)


EXTENSION = Extension(optimizers={"descent": NewOptimizer(update=descent)})
