"""The device's matmul rate, the ceiling of the steps."""

import time

import jax
import jax.numpy as jnp

from experiments.measurement.device_info import device_info

PRODUCTS = 8


def matmul_benchmark(point: dict) -> dict:
    """Returns the highest FLOP/s of a chain of large square products in one program."""
    device, dtype = jax.devices()[0], point["dtype"]
    size, repeats = (1024, 5) if device.platform == "cpu" else (8192, 20)
    x, w = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    w = w * jnp.asarray(size**-0.5, dtype)  # keeps the scale through the chain

    @jax.jit
    def chain(x, w):
        return jax.lax.fori_loop(0, PRODUCTS, lambda _, x: x @ w, x)

    seconds = []
    jax.block_until_ready(chain(x, w))
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(chain(x, w))
        seconds.append(time.perf_counter() - start)
    rate = PRODUCTS * 2 * size**3 / min(seconds)
    return {**device_info(device), "size": size, "flops_per_second": rate}
