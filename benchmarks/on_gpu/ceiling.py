"""What this machine's matrix products and copies reach, at the shapes of the model: the ceiling of a training step.

The products of one micro-batch, each by itself and with its operands in place: forward, the gradient of the input and
the gradient of the weight. A step also has attention, norms, the loss and the optimizer, so no step reaches it.
"""

from functools import partial
from typing import Any

import torch

from megatron_hammer.model.accounting import padded_vocab_size
from megatron_hammer.model.shape import ModelShape
from megatron_hammer.platforms.device import read_device_name
from megatron_hammer.platforms.operator_benchmark import Bench, random_tensor

COPY_BYTES = {"cuda": 2**30, "cpu": 2**25}


def list_products(model: ModelShape) -> dict[str, tuple[int, int, int]]:
    """Input width, output width and number per forward pass of every weight matrix of a dense model."""
    qkv = (model.num_attention_heads + 2 * model.num_query_groups) * model.head_dim
    gated = 2 if model.activation == "swiglu" else 1
    layers = model.num_layers
    return {
        "qkv": (model.hidden_size, qkv, layers),
        "proj": (model.num_attention_heads * model.head_dim, model.hidden_size, layers),
        "fc1": (model.hidden_size, gated * model.ffn_hidden_size, layers),
        "fc2": (model.ffn_hidden_size, model.hidden_size, layers),
        "head": (model.hidden_size, padded_vocab_size(model.vocab_size), 1),
    }


def measure(model: ModelShape, platform: str, num_tokens: int, dtype: str, seconds: float) -> dict[str, Any]:
    """TFLOP/s of each product and of all together, weighted as in a micro-batch of `num_tokens`; GB/s of a copy."""
    bench = Bench(platform, seconds)
    products, total_flops, total_s = [], 0.0, 0.0
    for name, (inputs, outputs, number) in list_products(model).items():
        flops = 2.0 * num_tokens * inputs * outputs
        for direction, median_s in time_product(bench, dtype, num_tokens, inputs, outputs).items():
            products.append({"product": name, "direction": direction, "tflops": flops / median_s / 1e12})
            total_flops, total_s = total_flops + number * flops, total_s + number * median_s
    copied = torch.empty(COPY_BYTES[platform], dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(copied)
    bench.add("copy", (copied.numel(),), "uint8", partial(target.copy_, copied))
    return {
        "device": read_device_name(platform),
        "num_tokens": num_tokens,
        "dtype": dtype,
        "tflops": total_flops / total_s / 1e12,
        "products": products,
        "copy_gb_per_s": 2 * copied.numel() / bench.timings[-1].median_s / 1e9,  # read and written
    }


def time_product(bench: Bench, dtype: str, tokens: int, inputs: int, outputs: int) -> dict[str, float]:
    """Median seconds of y = x w^T, dx = dy w and dw = dy^T x, for x [tokens, inputs] and w [outputs, inputs]."""
    x, w = random_tensor(bench, dtype, tokens, inputs), random_tensor(bench, dtype, outputs, inputs)
    dy = random_tensor(bench, dtype, tokens, outputs)
    y, dx, dw = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(w)
    calls = {
        "forward": partial(torch.mm, x, w.t(), out=y),
        "dgrad": partial(torch.mm, dy, w, out=dx),
        "wgrad": partial(torch.mm, dy.t(), x, out=dw),
    }
    medians = {}
    for direction, call in calls.items():
        bench.add("gemm", (tokens, inputs, outputs), dtype, call)
        medians[direction] = bench.timings[-1].median_s
    return medians
