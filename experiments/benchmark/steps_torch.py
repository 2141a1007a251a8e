"""The step of a point in PyTorch: eager with the faster attention, or compiled with SDPA.

Variants: `eager`, `channels-last` (eager, in that memory layout), `compile`.
"""

import contextlib
import os
import time

import numpy as np
import torch
import transformers

from experiments.benchmark import random_weights, sam_torch


class Step:
    """A step: a call runs it once and waits. `facts` are known before the first call.

    In bfloat16, training is automatic mixed precision (float32 parameters) and inference has
    bfloat16 weights. float32 products on a GPU may be TF32, as in JAX by default.
    """

    def __init__(self, point: dict, sizes: dict, variant: str):
        if hasattr(os, "sched_getaffinity"):
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.set_float32_matmul_precision("high")
        self._cuda = torch.cuda.is_available()
        self._device = torch.device("cuda" if self._cuda else "cpu")
        self._point, self._sizes, self._variant = point, sizes, variant
        size = point["image_size"]
        images, labels = random_weights.batch(
            point["batch"], size, random_weights.CLASSES, channels=True
        )
        images = torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))
        layout = torch.channels_last if variant == "channels-last" else torch.contiguous_format
        self._images = images.to(self._device).contiguous(memory_format=layout)
        self._labels = torch.from_numpy(labels).long().to(self._device)
        tensors = {n: t.to(self._device) for n, t in sam_torch.load_tensors(sizes).items()}
        self._half = point["dtype"] == "bfloat16"
        if self._half and point["task"] != "training":
            self._images = self._images.bfloat16()
        attention = "sdpa" if variant == "compile" else self._faster(tensors)
        self._step = self._make(tensors, attention)
        start = time.perf_counter()
        self()
        self.facts = {
            "attention": attention,
            "first_seconds": time.perf_counter() - start,
            "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        }

    def __call__(self) -> None:
        self._step()
        if self._cuda:
            torch.cuda.synchronize()

    def peak_bytes(self) -> int | None:
        """Returns the peak of the GPU's memory; None on a CPU, where the process counts."""
        return torch.cuda.max_memory_allocated() if self._cuda else None

    def _faster(self, tensors) -> str:
        """Returns `sdpa` or `eager`, whichever is faster for this point."""
        seconds = {}
        for attention in ("sdpa", "eager"):
            with contextlib.suppress(torch.OutOfMemoryError):
                self._step = self._make(dict(tensors), attention)
                self()
                start = time.perf_counter()
                self()
                self()
                seconds[attention] = time.perf_counter() - start
        self._step = None
        if self._cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return min(seconds, key=seconds.get) if seconds else "sdpa"

    def _make(self, tensors, attention: str):
        # The decoder's parameters are trained, hence copied; the frozen ones are shared.
        tensors = {n: t.clone() if n.startswith("mask_decoder") else t for n, t in tensors.items()}
        model = sam_torch.build(self._sizes, tensors, attention).to(self._device)
        if self._variant == "channels-last":
            model = model.to(memory_format=torch.channels_last)
        task = self._point["task"]
        if task == "training":
            return self._training(model)
        if self._half:
            model = model.bfloat16()
        run = self._maybe_compiled(sam_torch.encode if task == "encoder" else sam_torch.predict)

        def forward():
            with torch.inference_mode():
                run(model, self._images)

        return forward

    def _training(self, model):
        optimizer, loss = sam_torch.optimizer_of(model), self._maybe_compiled(sam_torch.loss)

        def train():
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._half):
                value = loss(model, self._images, self._labels)
            value.backward()
            optimizer.step()

        return train

    def _maybe_compiled(self, function):
        return torch.compile(function) if self._variant == "compile" else function
