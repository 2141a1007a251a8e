"""Tasks other than steps: the device's matmul rate, and the benchmarks of other modules."""

import importlib
import time

PRODUCTS = 8
_TASKS = {  # module, function, whether it takes the point
    "scoring": ("scoring", "scoring_benchmark", False),
    "startup": ("startup", "startup_benchmark", False),
    "loop": ("train_loop", "loop_benchmark", True),
    "run": ("train_loop", "run_benchmark", True),
    "encoded": ("feature_cache", "encoded_benchmark", True),
    "encoded_flops": ("feature_cache", "encoded_flops", True),
}


def measure(point: dict) -> dict:
    """Returns the record of a task that is not a step; `point` as a dictionary."""
    if point["task"] == "matmul":
        return _matmul(point["dtype"])
    module, function, takes_point = _TASKS[point["task"]]
    run = getattr(importlib.import_module(f"experiments.benchmark.{module}"), function)
    return run(point) if takes_point else run()


def _matmul(dtype: str) -> dict:
    """Returns the highest FLOP/s of a chain of large square products in one program."""
    import jax
    import jax.numpy as jnp

    from experiments.measurement.device_info import device_info

    device = jax.devices()[0]
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
