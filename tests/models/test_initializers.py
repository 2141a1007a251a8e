"""How parameters start: the same numbers from the same keys, and few programs to compile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pgpsam_jax.models import initializers, layers


def test_draws_are_the_keys_of_nnx():
    ours, theirs = initializers.FastRngs(11), nnx.Rngs(11)
    for _ in range(3):
        assert (jax.random.key_data(ours.params()) == jax.random.key_data(theirs.params())).all()
    ours, theirs = (rngs(jax.random.key(4)) for rngs in (initializers.FastRngs, nnx.Rngs))
    assert (jax.random.key_data(ours.params()) == jax.random.key_data(theirs.params())).all()


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_a_parameter_of_any_size_is_the_beginning_of_the_same_numbers(distribution):
    """Chunks are of two sizes; a larger parameter has more of them, each from a key of its own."""
    sizes = (5, 1 << 12, (1 << 12) + 1, (1 << 16) + 7)
    drawn = [initializers.sample(initializers.FastRngs(2), (size,), distribution) for size in sizes]
    key = initializers.FastRngs(2).params()
    for size, numbers in zip(sizes, drawn, strict=True):
        assert numbers.shape == (size,)
        np.testing.assert_array_equal(numbers[: 1 << 16], drawn[-1][:size][: 1 << 16])
    rest = getattr(jax.random, distribution)(jax.random.fold_in(key, 1), (1 << 16,))[:7]
    np.testing.assert_allclose(drawn[-1][1 << 16 :], rest, rtol=1e-6)


def test_a_new_size_compiles_nothing():
    """A model has a hundred shapes; JAX compiles one program for each to fill or convert it."""

    def module(width):
        rngs, common = initializers.FastRngs(0), dict(dtype=jnp.float32)
        layers.MlpBlock(width, width, activation=jax.nn.relu, **common, rngs=rngs)
        layers.LayerNorm(width, eps=1e-6, **common, rngs=rngs)
        initializers.zeros_param(width, 3)

    module(6)
    events = []

    def listen(name, *_, **__):
        events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        module(7)
        assert not [name for name in events if name.endswith("backend_compile_duration")]
        jax.jit(lambda x: x + 7.25)(0.5)  # that it would be heard of
        assert [name for name in events if name.endswith("backend_compile_duration")]
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
