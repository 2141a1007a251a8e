"""The train loop: dispatches steps ahead of the device and runs hooks between them."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import jax

# Steps in flight: the host prepares the next while the device computes, with bounded memory.
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
    """Runs the steps after `step`, up to `until` or a stop; fetches nothing from the device.

    Args:
      train_step: compiled; donates the state.
      state, frozen: train state and frozen parameters.
      feed: iterator of (batch, rows).
      step: steps done.
      until: last step.
      report: called with (step, metrics on the device, rows) for each step but the last, in order,
        once its metrics are ready.
      stop_after: called once per step; True makes that step the last.

    Returns:
      The state, and the number, metrics and rows of the last step.
    """
    under_way: collections.deque[tuple] = collections.deque()
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


@dataclasses.dataclass
class Moment:
    """The state of a run when hooks are called.

    Attributes:
      step: steps done.
      state: the train state; the next step donates it.
      metrics: of the last step, on the device.
      rows: (B,) rows of the few-shot list in the last batch.
      scalars: host numbers that hooks add for later hooks.
    """

    step: int
    state: Any
    metrics: dict
    rows: Any
    scalars: dict = dataclasses.field(default_factory=dict)


class TrainLoop:
    """Runs steps until the run ends or a signal stops it; pauses when a hook is due.

    Args:
      total: steps of the whole run.
      report: see `run_steps`; called for steps without a pause.
      stop_after: called once per step; True makes that step the last.
    """

    def __init__(self, total: int, report: Callable, stop_after: Callable[[int], bool]):
        self._total, self._report, self._stop_after = total, report, stop_after
        self._hooks: list[tuple[Callable | None, bool, Callable]] = []
        self._stopping = False

    def add_hook(
        self,
        hook: Callable[[Moment], None],
        *,
        every: int = 0,
        when: Callable[[int], bool] | None = None,
        at_end: bool = False,
    ) -> None:
        """Adds a callback; hooks run in the order in which they were added.

        With neither `every` nor `when`, the hook runs at each pause that other hooks ask for.

        Args:
          hook: called with the `Moment`.
          every: runs the hook after each `every`-th step.
          when: runs the hook after the steps for which it returns True.
          at_end: also runs the hook after the last step, of the run or before a stop.
        """
        if every:
            when = lambda step: step % every == 0  # noqa: E731
        self._hooks.append((when, at_end, hook))

    def run(self, compiled, state, frozen, feed, step: int):
        """Runs the steps after `step`; returns the state and the number of steps done."""
        while step < self._total and not self._stopping:
            until = next(n for n in range(step + 1, self._total + 1) if self._pauses(n))
            state, step, metrics, rows = run_steps(
                compiled, state, frozen, feed, step, until, self._report, self._stops
            )
            moment = Moment(step, state, metrics, rows)
            ending = self._stopping or step == self._total
            for when, at_end, hook in self._hooks:
                if when is None or when(step) or (at_end and ending):
                    hook(moment)
        return state, step

    def _pauses(self, step: int) -> bool:
        return step == self._total or any(when and when(step) for when, *_ in self._hooks)

    def _stops(self, step: int) -> bool:
        self._stopping = self._stop_after(step)
        return self._stopping
