"""The hot loop: steps are dispatched ahead of the device and reported once they are computed."""

import collections
from collections.abc import Callable

import jax

# Steps under way at a time: the host prepares the next while the device computes, and what waits
# on the device stays bounded.
AHEAD = 2


def run_steps(
    train_step,
    state,
    frozen,
    feed,
    step: int,
    until: int,
    report: Callable,
    stop_after: Callable[[int], bool] = lambda step: False,
):
    """Do the steps after `step`; returns the state, and number, metrics and rows of the last one.

    That is `until`, or an earlier one for which `stop_after(step)` is true; it is asked about each.
    `train_step` is compiled and takes over the state it is given. `report(step, metrics, rows)` is
    called, in order, for each step but the last, when its `metrics` (on the device) are ready.
    Nothing but what `feed` sends reaches the device, and nothing comes back unasked.
    """
    under_way = collections.deque()
    while step < until:
        batch, rows = next(feed)
        with jax.transfer_guard("disallow"):
            state, metrics = train_step(state, frozen, batch)
        step += 1
        if stop_after(step):
            until = step
        if step < until:
            under_way.append((step, metrics, rows))
        while under_way and (len(under_way) > AHEAD or step == until):
            oldest = under_way.popleft()
            jax.block_until_ready(oldest[1])
            report(*oldest)
    return state, step, metrics, rows
