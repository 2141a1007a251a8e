"""Logs of a training run: metrics.jsonl, the loss curve, TensorBoard, a progress bar."""

import contextlib
import json
import math
import time
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from pgpsam_jax.distributed import multihost
from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.files import naming, read_metrics, write_text

_CURVE_SECONDS = 30


class MetricLogger:
    """Context manager that logs one run; only the first process writes files."""

    def __init__(self, workdir, config_log, start: int, rates, batch_size: int, slices=()):
        """Opens the logs of a run.

        Args:
          workdir: of the run.
          config_log: `config.log`.
          start: steps done before.
          rates: learning rate of each step of the run; NaN for a fit.
          batch_size: slices per step.
          slices: (case id, slice) of each row of the few-shot list.
        """
        total, self._slices = len(rates), slices
        self.workdir, self.batch_size = Path(workdir), batch_size
        self._every, self._rates = config_log.every_steps, rates
        self.writes = multihost.is_first()
        self.records = self._kept_records(start)
        self._bar = tqdm(
            total=total, initial=start, unit="step", desc="training", disable=not self.writes
        )
        self._last_step, self._last_time = start, time.perf_counter()
        self._curve_time = self._last_time
        self._board = self._tensorboard() if config_log.tensorboard and self.writes else None
        if self.writes:
            self._file = open(self.workdir / "metrics.jsonl", "a", encoding="utf-8")

    def _kept_records(self, start: int) -> list[dict]:
        """Records up to the restored step; removes later ones from the file."""
        path = self.workdir / "metrics.jsonl"
        records = [r for r in read_metrics(path) if r["step"] <= start]
        steps = [0, *(r["step"] for r in records)]
        if start - steps[-1] >= max([self._every, *np.diff(steps)]):
            multihost.print_once(f"warning: {path} is damaged: it holds no step after {steps[-1]}")
        if self.writes and path.is_file():
            write_text(path, "".join(json.dumps(r) + "\n" for r in records))
        return records

    def _tensorboard(self):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError(
                "log.tensorboard is on but tensorboardX is not installed; "
                "run pip install '.[tensorboard]'"
            ) from None
        return SummaryWriter(str(self.workdir / "tensorboard"))

    def record(self, step: int, metrics: dict, rows, **extra) -> None:
        """Counts one finished step and logs it if due; metrics are fetched only then.

        Logged are each `log.every_steps`-th step, the last, and those with `extra` host scalars.

        Args:
          step: number of steps done.
          metrics: scalars on the device.
          rows: (B,) rows of the few-shot list in the batch.
          extra: further host scalars for the record.
        """
        self._bar.update()
        self.check_finite(step, metrics, rows)
        if step % self._every and step < len(self._rates) and not extra:
            return
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        rate = float(self._rates[step - 1])
        rates = {"learning_rate": rate} if math.isfinite(rate) else {}
        self.write(step, values | extra | rates)

    def check_finite(self, step: int, metrics: dict, rows) -> None:
        """Raises a `UserError` that names the batch if loss or gradient norm is not finite."""
        for name in ("loss", "gradient_norm"):
            value = float(jax.device_get(metrics[name]))
            if not math.isfinite(value):
                raise UserError(
                    f"the {name.replace('_', ' ')} is {value} at step {step}, whose batch is "
                    f"{self._named(rows)}; earlier checkpoints are kept; start again in a new "
                    "--workdir with a lower optim.learning_rate or with optim.clip_norm=1"
                )

    def _named(self, rows) -> str:
        """Names the slices of a batch by case."""
        if not self._slices:
            return f"rows {rows.tolist()}"
        found = defaultdict(list)
        for case, index in (self._slices[row] for row in rows):
            found[case].append(str(index))
        return ", ".join(f"{case} slice {' '.join(found[case])}" for case in sorted(found))

    def write(self, step: int, metrics: dict) -> None:
        """Appends one record of host scalars; refreshes the curve every half minute."""
        now = time.perf_counter()
        rate = (step - self._last_step) * self.batch_size / (now - self._last_time)
        self._last_step, self._last_time = step, now
        self._bar.set_postfix_str(f"loss {metrics['loss']:.3f}, {rate:.1f} images/s")
        record = {"step": step, **metrics, "images_per_second": float(f"{rate:.4g}")}
        self.records.append(record)
        if not self.writes:
            return
        with naming(self.workdir / "metrics.jsonl"):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        if self._board:
            for name, value in record.items():
                self._board.add_scalar(name, value, step)
        if now - self._curve_time > _CURVE_SECONDS:
            self._curve_time = now
            with self.paused():
                self._draw()

    def _draw(self) -> None:
        from pgpsam_jax.visualization.training_curve import write_training_curve

        if len(self._rates) < 2:  # a fit has no curve
            return
        write_training_curve(self.records, self.workdir / "training.png")

    @contextlib.contextmanager
    def paused(self):
        """Excludes the time inside the block (saving, validating) from the next rate."""
        start = time.perf_counter()
        yield
        self._last_time += time.perf_counter() - start

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._bar.close()
        if self.writes:
            self._file.close()
            if self.records and not isinstance(error, UserError | OSError):
                self._draw()
        if self._board:
            self._board.close()
