"""No network for benchmarks. Call it before torch, megatron or transformers are imported, which is why it is apart."""

import importlib.util
import os
import sys

from megatron_hammer.errors import PlatformError


def forbid_network() -> None:
    """Have the libraries of Hugging Face read local files only; they look at these variables when they are imported.

    Where nobody watches stderr, progress bars are switched off too: lm-eval has one for every task. Raises
    PlatformError without lm-eval.
    """
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_EVALUATE_OFFLINE="1")
    if not sys.stderr.isatty():
        os.environ.update(TQDM_DISABLE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    if importlib.util.find_spec("lm_eval") is None:
        raise PlatformError(
            "lm-eval: must be installed for benchmarks, got none. Run pip install 'megatron_hammer[evaluation]'."
        )
