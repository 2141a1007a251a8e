"""Generator of abdominal CT phantoms in the BTCV/Synapse layout; needs no download.

`make_case` maps (seed, case) to one volume; `generate` writes a data set and repairs it. The
anatomy is in `body`, `organs` and `bowel`.
"""

import contextlib
import gzip
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage
from tqdm import tqdm

from pgpsam_jax.data.phantom.body import Patient, draw_body
from pgpsam_jax.data.phantom.organs import draw_organs
from pgpsam_jax.data.phantom.shapes import Scene, smooth_field
from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.files import file_digest, read_record, write_json

VERSION = 1  # increment when images change: data sets of other versions are regenerated
CASES = (*range(1, 11), *range(21, 41))  # the 30 labeled BTCV cases of the 18/12 split
MANIFEST = "phantom.json"
PIXELS = 160
# Stored axes and (qform code, sform code) vary over cases, to exercise all paths of a reader.
ORIENTATIONS = ("LPS", "RAS", "LAS", "PSR", "RPI", "SAL")
FORM_CODES = ((1, 1), (1, 0), (0, 2), (2, 1))


def make_case(seed: int, case_id: int):
    """Generates one phantom; the same (seed, case_id) and software give the same bytes.

    Returns:
        image (int16 HU), label (uint8 BTCV ids), affine (4, 4) from voxel to RAS mm; array axes in
        the storage orientation of the case.
    """
    rng = np.random.default_rng([seed, int(case_id)])
    scene = _draw_patient(rng)
    image = _scan(scene, rng)
    step = np.diag([-scene.spacing[2], -scene.spacing[1], scene.spacing[0], 1.0])  # LPS axes
    tilt = np.radians(rng.uniform(2, 4)) if case_id % 6 == 0 else 0.0  # some scans are oblique
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]]
    affine = turn @ step
    corner = [PIXELS / 2 * scene.spacing[2], PIXELS / 2 * scene.spacing[1], -900.0]
    affine[:3, 3] = rng.uniform((-20, -20, -300), (20, 20, 300)) + corner
    affine = np.round(affine, 5)
    wanted = nib.orientations.axcodes2ornt(ORIENTATIONS[case_id % len(ORIENTATIONS)])
    change = nib.orientations.ornt_transform(nib.io_orientation(affine), wanted)
    volumes = [v.transpose(2, 1, 0) for v in (image, scene.label)]
    affine = affine @ nib.orientations.inv_ornt_aff(change, volumes[0].shape)
    image, label = (nib.orientations.apply_orientation(v, change) for v in volumes)
    return np.ascontiguousarray(image), np.ascontiguousarray(label), affine


def _draw_patient(rng) -> Scene:
    """Draws a patient on the couch: noise-free HU and labels."""
    patient = Patient(rng)
    # The field of view fits the body, as a radiographer would set it.
    width = 2 * (1.03 * patient.half_width + 1.2 * patient.fat + 12)
    pixel = float(np.clip(width / PIXELS, 2.2, 2.6))
    slice_mm = float(rng.uniform(4.1, 5.9))
    slices = int(np.clip(round(rng.uniform(206, 216) / slice_mm), 36, 52))
    shift = (rng.uniform(-8, -2), *rng.uniform(-5, 5, 2))
    spacing = (round(slice_mm, 3), round(pixel, 4), round(pixel, 4))
    shape = (slices, PIXELS, PIXELS)
    tilt = float(rng.uniform(-7, 7))
    scene = Scene(rng, shape, spacing, tilt_deg=tilt, shift=shift, warp_mm=3.5)
    draw_body(scene, patient, rng)
    draw_organs(scene, patient, rng)
    return scene


def _scan(scene: Scene, rng):
    """Adds point spread, correlated noise and slight shading; returns int16 HU."""
    hu = ndimage.gaussian_filter(scene.hu, (0.3, 0.45, 0.45))
    noise = rng.standard_normal(scene.shape, dtype=np.float32)
    noise = ndimage.gaussian_filter(noise, (0.35, 0.75, 0.75))
    hu += np.float32(rng.uniform(8, 13)) / noise.std() * noise
    hu += 3 * smooth_field(rng, scene.shape, (1, 2, 2))
    return np.clip(np.rint(hu), -1024, 3071).astype(np.int16)


def generate(root, *, seed: int = 0, cases=None, workers: int | None = None) -> Path:
    """Generates the phantom data set in `root`, keeping intact cases.

    Writes `RawData/Training/{img/imgNNNN,label/labelNNNN}.nii.gz` and `phantom.json` (version,
    seed, SHA-256 of both files of each case). Missing, damaged or half-written cases, and those of
    another seed or version, are regenerated.

    Args:
        cases: case ids; default: the 30 labeled BTCV cases.
        workers: threads; default: one per core, at most 8. Does not affect the data.

    Raises:
        UserError: `root` cannot be written, or has a `RawData` folder of other origin.
    """
    root = Path(root)
    cases = {int(case) for case in (CASES if cases is None else cases)}
    if not _inspect(root, seed, cases)[1]:
        return root
    if (root / "RawData").exists() and not (root / MANIFEST).exists():
        raise UserError(
            f"{root} has a RawData folder not written by the phantom generator; "
            "choose another folder for the phantom."
        )
    try:
        with _locked(root):
            _complete(root, seed, cases, workers or min(os.cpu_count() or 1, 8))
    except OSError as error:
        raise UserError(
            f"cannot write the phantom to {root} ({error.strerror or error}); "
            "choose a writable folder with 100 MB of free space."
        ) from error
    return root


def _paths(case: int):
    folder = Path("RawData") / "Training"
    return folder / "img" / f"img{case:04d}.nii.gz", folder / "label" / f"label{case:04d}.nii.gz"


def _inspect(root: Path, seed, cases):
    """Returns ({intact case: digests}, missing cases, cases of another seed or version)."""

    def parse(manifest):
        listed = {int(case): list(digests) for case, digests in manifest["sha256"].items()}
        return listed, (manifest["version"], manifest["seed"]) == (VERSION, seed)

    listed, same = read_record(root / MANIFEST, parse, missing=({}, True), damaged=({}, True))
    if not same:
        return {}, sorted(cases), sorted(listed)
    intact = {case: digests for case, digests in listed.items() if _digests(root, case) == digests}
    return intact, sorted((cases | listed.keys()) - intact.keys()), []


def _digests(root: Path, case):
    paths = [root / path for path in _paths(case)]
    return [file_digest(path) if path.is_file() else None for path in paths]


@contextlib.contextmanager
def _locked(root: Path):
    """Locks `root` for one generator at a time; the lock ends with the process."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".phantom.lock", "w") as file:
        with contextlib.suppress(ImportError, OSError):  # where locks are not supported
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
            for left_over in root.glob(".tmp-phantom-*"):  # of a killed run, as we hold the lock
                shutil.rmtree(left_over, ignore_errors=True)
        yield


def _complete(root: Path, seed, cases, workers):
    """Generates missing cases in a temporary folder, lists them, then moves them into place.

    The manifest is written before the files are moved: if the process is killed in between, the
    files do not match it and are regenerated.
    """
    # Again: another generator may have held the lock.
    intact, missing, stale = _inspect(root, seed, cases)
    with tempfile.TemporaryDirectory(prefix=".tmp-phantom-", dir=root) as temporary:
        folder = Path(temporary)
        with ThreadPoolExecutor(workers) as pool:
            jobs = pool.map(lambda case: _write_case(folder, seed, case), missing)
            shown = tqdm(jobs, "phantom", len(missing), leave=False, disable=None)
            made = dict(zip(missing, shown, strict=True))
        for path in (path for case in stale for path in _paths(case)):
            (root / path).unlink(missing_ok=True)
        digests = {f"{case:04d}": digest for case, digest in sorted((intact | made).items())}
        write_json(root / MANIFEST, {"version": VERSION, "seed": seed, "sha256": digests})
        for path in (path for case in made for path in _paths(case)):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder / path, root / path)


def _write_case(folder: Path, seed, case):
    """Writes image and label of a case under `folder`; returns their SHA-256."""
    image, label, affine = make_case(seed, case)
    qform, sform = FORM_CODES[case % len(FORM_CODES)]
    for path, data in zip(_paths(case), (image, label), strict=True):
        nifti = nib.Nifti1Image(data, affine)
        nifti.set_qform(affine, qform)
        nifti.set_sform(affine, sform)
        nifti.header.set_xyzt_units("mm")
        nifti.header["descrip"] = f"pgpsam_jax phantom {VERSION}, seed {seed}".encode()
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        # No time stamp, so that the same case gives the same file.
        (folder / path).write_bytes(gzip.compress(nifti.to_bytes(), 1, mtime=0))
    return _digests(folder, case)
