"""Warning at the end of a run whose loss has hardly fallen."""

import numpy as np

_FEWEST_STEPS, _FEWEST_RECORDS = 100, 20  # by which a loss that falls has fallen


def stagnation(records: list[dict]) -> str | None:
    """Returns a sentence if the loss has hardly fallen over a run, else None.

    That is, if the median of the last tenth of the records is not below the lower quartile of the
    first tenth (of at most ten records, as a long run may learn early). Short runs get no verdict.

    records: of metrics.jsonl, with those before a resumption.
    """
    losses = [record["loss"] for record in records]
    if len(losses) < _FEWEST_RECORDS or records[-1]["step"] < _FEWEST_STEPS:
        return None
    tenth = max(3, len(losses) // 10)
    first, last = losses[: min(tenth, 10)], losses[-tenth:]
    if np.median(last) < np.quantile(first, 0.25):
        return None
    return (
        f"!!! the loss has hardly fallen: median {np.median(first):.4g} of the first {len(first)} "
        f"records, {np.median(last):.4g} of the last {len(last)}; try another "
        "optim.learning_rate, and check the labels with pgpsam verify"
    )
