"""Segment NIfTI files with a trained run: masks on the input's own grid, label names beside.

python -m pgpsam_jax.predict --workdir runs/x --input FILE_OR_FOLDER --output FOLDER
"""

import argparse
import collections
import functools
from pathlib import Path

from tqdm import tqdm

from pgpsam_jax.config import load_config
from pgpsam_jax.data.nifti import Volume, read_image
from pgpsam_jax.data.volume_files import Inputs, find_inputs, stem_of
from pgpsam_jax.errors import UserError, exit_on_user_error
from pgpsam_jax.evaluation.outputs import Predicted, write_prediction
from pgpsam_jax.evaluation.workers import ahead, check, in_order, worker_count
from pgpsam_jax.files import write_json
from pgpsam_jax.hostmemory import keep_freed_memory
from pgpsam_jax.text_files import shown

_LONGEST = 2000  # characters of a line


def predict(
    predictor,
    names,
    inputs: Inputs,
    output,
    *,
    overlay: bool,
    skip_existing: bool,
    workers: int = 0,
) -> int:
    """Write `<output>/<name>.nii.gz` for every input; returns the number of files that failed.

    A file that cannot be read is reported and passed over: the rest of a folder is still done.
    `workers` as in `evaluate`: processes write a mask while the next volume is predicted.
    """
    output = Path(output)
    if inputs.passed_over:
        tqdm.write(inputs.passed_over)
    for fault in inputs.faults:
        _report(fault)
    failed, inputs = list(inputs.faults), inputs.files
    for path in inputs:
        target = output / f"{stem_of(path)}.nii.gz"
        if target.resolve() == path.resolve():
            raise UserError(f"{target} would overwrite its input; choose another --output")
    if skip_existing:
        inputs = [path for path in inputs if not (output / f"{stem_of(path)}.nii.gz").is_file()]
    write_json(output / "labels.json", {name: i for i, name in enumerate(names)})

    def predicted():
        progress = tqdm(inputs, desc="predicting", unit="volume")
        for path, volume in zip(progress, ahead(_read, inputs), strict=True):
            if isinstance(volume, UserError):
                _report(volume)
                failed.append(path)
                continue
            image = volume.array if overlay else None
            ids = predictor(volume)
            yield Predicted(stem_of(path), ids, volume.spacing, volume.source, image=image)

    write = functools.partial(write_prediction, folder=output, names=names, window=predictor.window)
    size = sum(path.stat().st_size for path in inputs)  # a compressed CT takes a byte per voxel
    count = worker_count(workers, len(inputs), size)
    collections.deque(in_order(write, predicted(), count), maxlen=0)
    return len(failed)


def _report(error: UserError) -> None:
    tqdm.write(shown(f"error: {error}", _LONGEST))  # names of files are untrusted


def _read(path: Path) -> Volume | UserError:
    try:
        return read_image(path)
    except UserError as error:
        return error


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pgpsam_jax.predict", description=__doc__)
    parser.add_argument("--workdir", required=True, help="folder of a trained run")
    parser.add_argument("--input", required=True, help="a NIfTI file or a folder of them")
    parser.add_argument("--output", required=True, help="folder for the masks")
    parser.add_argument("--overlay", action="store_true", help="a PNG of slices beside each mask")
    parser.add_argument("--skip-existing", action="store_true", help="keep masks already there")
    parser.add_argument("--base", help="converted SAM of the run, if the run cannot find it")
    arguments = parser.parse_args()
    with exit_on_user_error():
        from pgpsam_jax.methods import refuse_without_labels
        from pgpsam_jax.trained import load_run

        config = load_config(arguments.workdir)  # what takes no time to refuse first
        check(config.eval.workers)
        refuse_without_labels(config.model)
        inputs = find_inputs(arguments.input)
        run = load_run(arguments.workdir, arguments.base)
        failed = predict(
            run.predictor,
            run.label_names,
            inputs,
            arguments.output,
            overlay=arguments.overlay,
            skip_existing=arguments.skip_existing,
            workers=run.config.eval.workers,
        )
        if failed:
            raise UserError(
                f"{failed} of {len(inputs.files) + len(inputs.faults)} files could not be read "
                f"(see above); the others are in {arguments.output}"
            )


if __name__ == "__main__":
    keep_freed_memory()
    main()
