"""The five numbers of a loss law from points (N, D, loss), for many weightings of the points at once.

The objective is approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556, section 3.3 and appendix D.4):

    minimise  sum_i w_i * Huber_delta( LSE(a - alpha log N_i, b - beta log D_i, e) - log loss_i ),  delta = 1e-3

with A = exp(a), B = exp(b), E = exp(e), LSE the log of a sum of exponentials. It is summed, never averaged: an averaged
objective is so small that an optimizer's tolerance ends the search early (Besiroglu et al. 2024, arXiv 2404.10102,
section 3). The search is Levenberg-Marquardt on reweighted least squares rather than Hoffmann's L-BFGS. Each step
solves a 5 x 5 system for each problem (a start, or a bootstrap sample), so a thousand cost about as much as a few.
"""

from typing import Final

import numpy as np

HUBER_DELTA: Final = 1e-3
NUM_PARAMETERS: Final = 5
MAX_EXPONENT: Final = 3.0
MIN_EXPONENT: Final = 1e-3
# A term below this share of the smallest loss is none: exp(-14) is 1e-6.
SMALLEST_LOG_SHARE: Final = -14.0
START_EXPONENTS: Final = (0.1, 0.25, 0.4, 0.6, 1.0, 1.6)
START_SHARES_OF_E: Final = (0.05, 0.3, 0.6, 0.85, 0.97)  # E over the smallest loss
NUM_REFINED_STARTS: Final = 16
_REFINE_ITERATIONS: Final = 3000
_START_ITERATIONS: Final = 40
_TOLERANCE: Final = 1e-10  # relative fall of the objective, ten steps in a row
# Of a bootstrap sample: its parameters are then right to far less than they scatter.
SAMPLE_TOLERANCE: Final = 1e-7
SAMPLE_ITERATIONS: Final = 300
_MAX_DAMPING: Final = 1e12


def solve_from_starts(num_parameters: np.ndarray, num_tokens: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """[5] (a, b, e, alpha, beta) of the smallest objective found from a grid of 180 starts. Inputs: [n] each."""
    starts = build_starts(num_parameters, num_tokens, losses)
    weights = np.ones((len(starts), len(losses)))
    rough, objectives = solve(num_parameters, num_tokens, losses, weights, starts, max_iterations=_START_ITERATIONS)
    best = np.argsort(objectives, kind="stable")[:NUM_REFINED_STARTS]
    fine, objectives = solve(num_parameters, num_tokens, losses, weights[best], rough[best])
    return fine[np.argmin(objectives)]


def build_starts(num_parameters: np.ndarray, num_tokens: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """[180, 5]: a grid over alpha, beta and E. A and B are then linear, and least squares gives them."""
    log_n, log_d = np.log(num_parameters), np.log(num_tokens)
    smallest = losses.min()
    floor = smallest * np.exp(SMALLEST_LOG_SHARE + 4)
    starts = []
    for alpha in START_EXPONENTS:
        for beta in START_EXPONENTS:
            # Each term is scaled to one at the middle of the points, so the two columns have the same size.
            columns = np.stack([np.exp(-alpha * (log_n - log_n.mean())), np.exp(-beta * (log_d - log_d.mean()))], 1)
            for share in START_SHARES_OF_E:
                scales = np.linalg.lstsq(columns, losses - share * smallest, rcond=None)[0]
                middle_a, middle_b = np.log(np.maximum(scales, floor))
                a, b = middle_a + alpha * log_n.mean(), middle_b + beta * log_d.mean()
                starts.append((a, b, np.log(share * smallest), alpha, beta))
    return np.array(starts)


def solve(
    num_parameters: np.ndarray,
    num_tokens: np.ndarray,
    losses: np.ndarray,
    weights: np.ndarray,
    starts: np.ndarray,
    *,
    max_iterations: int = _REFINE_ITERATIONS,
    tolerance: float = _TOLERANCE,
) -> tuple[np.ndarray, np.ndarray]:
    """Minimise the objective of each row of `weights` [r, n] from its row of `starts` [r, 5].

    Returns parameters [r, 5] and objectives [r]. The points N, D and loss are [n] each.
    """
    log_n, log_d, log_losses = np.log(num_parameters), np.log(num_tokens), np.log(losses)
    middle_n, middle_d = log_n.mean(), log_d.mean()
    x, y = log_n - middle_n, log_d - middle_d
    parameters = starts.copy()
    # At the middle of the points a and alpha (b and beta) are nearly independent; as written they are not.
    parameters[:, 0] -= parameters[:, 3] * middle_n
    parameters[:, 1] -= parameters[:, 4] * middle_d
    lower, upper = _bounds(log_losses)
    parameters = np.clip(parameters, lower, upper)
    objectives = np.empty(len(starts))
    active = np.arange(len(starts))
    current, damping, calm = parameters.copy(), np.full(len(starts), 1e-3), np.zeros(len(starts), dtype=int)
    objective = _objective(_residuals(current, x, y, log_losses)[0], weights)
    for _ in range(max_iterations):
        step = _solve_step(current, x, y, log_losses, weights[active], damping, lower, upper)
        trial = np.clip(current + step, lower, upper)
        trial_objective = _objective(_residuals(trial, x, y, log_losses)[0], weights[active])
        is_better = trial_objective < objective
        fall = np.where(is_better, (objective - trial_objective) / np.maximum(objective, 1e-300), 0.0)
        calm = np.where(fall > tolerance, 0, calm + 1)
        current[is_better], objective[is_better] = trial[is_better], trial_objective[is_better]
        damping = np.where(is_better, np.maximum(damping / 5, 1e-9), damping * 4)
        is_done = (calm >= 10) | (damping > _MAX_DAMPING)
        if is_done.any():
            parameters[active[is_done]], objectives[active[is_done]] = current[is_done], objective[is_done]
            # Solved problems leave the arrays, so that only the slow ones cost time.
            keep = ~is_done
            active, current, objective = active[keep], current[keep], objective[keep]
            damping, calm = damping[keep], calm[keep]
            if not len(active):
                break
    parameters[active], objectives[active] = current, objective
    parameters[:, 0] += parameters[:, 3] * middle_n
    parameters[:, 1] += parameters[:, 4] * middle_d
    return parameters, objectives


def _bounds(log_losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[5] each, for parameters taken at the middle of the points."""
    floor, ceiling = log_losses.min() + SMALLEST_LOG_SHARE, log_losses.max() + 3.0
    lower = np.array([floor, floor, floor, MIN_EXPONENT, MIN_EXPONENT])
    return lower, np.array([ceiling, ceiling, log_losses.min(), MAX_EXPONENT, MAX_EXPONENT])


def _residuals(
    parameters: np.ndarray, x: np.ndarray, y: np.ndarray, log_losses: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """([r, n] predicted minus measured log loss, [3, r, n] share of each term in the predicted loss)."""
    a, b, e, alpha, beta = (column[:, None] for column in parameters.T)
    exponents = np.stack([a - alpha * x, b - beta * y, np.broadcast_to(e, (len(parameters), len(x)))])
    largest = exponents.max(0)
    # exp() overflows for large exponents. With the largest one subtracted, no term is above 1.
    terms = np.exp(exponents - largest)
    total = terms.sum(0)
    return largest + np.log(total) - log_losses, terms / total


def _objective(residuals: np.ndarray, weights: np.ndarray) -> np.ndarray:
    size = np.abs(residuals)
    huber = np.where(size <= HUBER_DELTA, 0.5 * residuals**2, HUBER_DELTA * (size - 0.5 * HUBER_DELTA))
    return (weights * huber).sum(1)


def _solve_step(
    parameters: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    log_losses: np.ndarray,
    weights: np.ndarray,
    damping: np.ndarray,
    lower: np.ndarray,
    upper: np.ndarray,
) -> np.ndarray:
    """[r, 5]: the damped Gauss-Newton step of the quadratic that touches the Huber objective from above."""
    residuals, shares = _residuals(parameters, x, y, log_losses)
    # The derivative of a log-sum-exp by one of its exponents is the share of that term.
    jacobian = np.stack([shares[0], shares[1], shares[2], -shares[0] * x, -shares[1] * y], axis=-1)
    # With these weights, least squares has the gradient of the Huber objective.
    reweighted = weights * np.minimum(1.0, HUBER_DELTA / np.maximum(np.abs(residuals), 1e-300))
    weighted = jacobian * reweighted[:, :, None]
    normal = np.swapaxes(weighted, 1, 2) @ jacobian
    gradient = (weighted * residuals[:, :, None]).sum(1)
    # A parameter that stands at its bound and is pushed outwards stays there and out of the others' system.
    is_held = ((parameters <= lower) & (gradient > 0)) | ((parameters >= upper) & (gradient < 0))
    free = (~is_held).astype(float)
    normal *= free[:, :, None] * free[:, None, :]
    diagonal = np.einsum("rii->ri", normal)
    diagonal += damping[:, None] * diagonal + np.where(is_held, 1.0, 1e-15 * diagonal.max(1, keepdims=True) + 1e-300)
    return -np.linalg.solve(normal, (gradient * free)[:, :, None])[:, :, 0]
