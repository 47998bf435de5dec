"""Runs whose losses follow a known loss law with noise; a fit must find that law."""

import numpy as np

from megatron_hammer.scaling.loss_law.law import LossLaw, LossRun

# Near what is known of real models (arXiv 2404.10102), all different from one another.
TRUE_LAW = LossLaw(E=1.82, A=480.0, B=2080.0, alpha=0.35, beta=0.37)


def simulate_losses(
    law: LossLaw = TRUE_LAW, *, num_sizes: int = 5, num_ratios: int = 5, noise_ratio: float = 0.004, seed: int = 0
) -> list[LossRun]:
    """A grid of sizes times tokens a parameter; noise_ratio: standard deviation of the log of the loss."""
    random = np.random.default_rng(seed)
    runs = []
    for size in np.geomspace(4e7, 4e9, num_sizes).round():
        for ratio in np.geomspace(5, 80, num_ratios):
            tokens = round(size * ratio)
            loss = law.predict(size, tokens) * np.exp(noise_ratio * random.standard_normal())
            runs.append(
                LossRun(
                    name=f"{size / 1e6:.0f}m-{ratio:.0f}",
                    source="simulated",
                    num_parameters=int(size),
                    num_tokens=tokens,
                    loss=float(loss),
                    loss_source="simulated",
                )
            )
    return runs
