"""Read files in a process of their own and tell what each took.

python bounded.py, on Linux: a JSON list of [reader, path] on stdin; prints, for each, [what was
said, MiB by which the peak of memory rose, CPU seconds]. A reader is a name of `READERS`.
"""

import json
import sys
import time
from pathlib import Path

from pgpsam_jax.data import fewshot_list
from pgpsam_jax.data.io import volumes
from pgpsam_jax.data.io.array_files import ArrayFiles
from pgpsam_jax.data.layouts import label_table, nnunet, split, transunet
from pgpsam_jax.errors import UserError
from pgpsam_jax.models.sam.weights import read_safetensors
from weights_conversion.checkpoint_files import read_checkpoint

STATUS = Path("/proc/self/status")
READERS = {
    "image": volumes.read_image,
    "array": lambda path: volumes.read_image(ArrayFiles((path,), "image")),
    "checkpoint": read_checkpoint,
    "safetensors": read_safetensors,
    "few-shot list": fewshot_list.read_list,
    "label table": label_table.load_label_table,
    "split": lambda path: split.split_cases([], "file", file=path),
    "nnunet": lambda path: nnunet.scan(path.parent),
    "transunet": lambda path: transunet.scan(path.parent),
}


def peak() -> float:
    """MiB at the highest since `forget`: what `getrusage` tells includes the process before."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def forget() -> float:
    """Let the peak be what is held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def main() -> None:
    import h5py  # noqa: F401  so that its own size does not count

    told = []
    for reader, path in json.load(sys.stdin):
        before, start = forget(), time.process_time()
        try:
            READERS[reader](Path(path))
            said = "accepted"
        except UserError as error:
            said = str(error)
        told.append([said, peak() - before, time.process_time() - start])
    print(json.dumps(told))


if __name__ == "__main__":
    main()
