"""The known orders of label ids, and features as a file in another order would have them."""

from pgpsam_jax.data.layouts.label_table import SYNAPSE8
from pgpsam_jax.data.quality.label_order import ORDERS, known_orders

SAMED, ALPHABETICAL, CASCADE, BTCV, AMOS, FLARE = ORDERS
EIGHT = known_orders()[SAMED]


def renumbered(features, order):
    """The features as if the file had been written with another order's ids."""
    ids = {organ: i for i, organ in order.items()}
    return {ids[EIGHT[i]]: values for i, values in features.items() if EIGHT[i] in ids}


TABLES = known_orders() | {
    "SYNAPSE8": {i: SYNAPSE8.names[k] for i, k in SYNAPSE8.source_to_class.items() if k}
}
