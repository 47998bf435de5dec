"""What a fitted law asks for a target: the cheapest size and tokens for a loss, and the best size for given tokens.

With a cost of c N^e per token, the cheapest way to any loss has alpha A / N^alpha = e beta B / D^beta: a little more of
either lowers the loss equally for the same money. This is the frontier of `optimum.py`, entered from its other sides.
"""

import numpy as np

from megatron_hammer.scaling.loss_law.law import LossFit
from megatron_hammer.scaling.loss_law.optimum import TokenCost


def law_parameters(fit: LossFit) -> np.ndarray:
    """[1 + r, 5]: (a, b, e, alpha, beta) of the law itself, then of each bootstrap sample."""
    law = fit.law
    return np.vstack([[np.log(law.A), np.log(law.B), np.log(law.E), law.alpha, law.beta], fit.samples])


def find_cheapest_run(parameters: np.ndarray, cost: TokenCost, loss: float) -> tuple[np.ndarray, np.ndarray]:
    """([r] sizes, [r] tokens) that reach the loss at the least cost; inf for a law whose floor E is not below it."""
    a, b, e, alpha, beta = parameters.T
    left = loss - np.exp(e)  # what size and tokens may leave between them
    is_open = left > 0
    log_left = np.log(np.where(is_open, left, 1.0))
    total = alpha + cost.exponent * beta
    log_size = (a - log_left - np.log(cost.exponent * beta / total)) / alpha
    log_tokens = (b - log_left - np.log(alpha / total)) / beta
    return tuple(np.where(is_open, _exp(values), np.inf) for values in (log_size, log_tokens))  # type: ignore[return-value]


def find_size_for_tokens(parameters: np.ndarray, cost: TokenCost, num_tokens: float) -> np.ndarray:
    """[r]: sizes for which so many tokens are the cheapest number: alpha A / N^alpha = e beta B / D^beta."""
    a, b, _, alpha, beta = parameters.T
    return _exp((np.log(alpha / (cost.exponent * beta)) + a - b + beta * np.log(num_tokens)) / alpha)


def count_tokens_for_loss(parameters: np.ndarray, num_parameters: float, loss: float) -> np.ndarray:
    """[r]: tokens with which this size reaches the loss; inf where it does not with any number."""
    a, b, e, alpha, beta = parameters.T
    left = loss - np.exp(e) - np.exp(a - alpha * np.log(num_parameters))
    return np.where(left > 0, _exp((b - np.log(np.where(left > 0, left, 1.0))) / beta), np.inf)


def _exp(logs: np.ndarray) -> np.ndarray:
    """e^x, infinite instead of a warning beyond the range of a double."""
    return np.where(logs < 700, np.exp(np.minimum(logs, 700)), np.inf)
