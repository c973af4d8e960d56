"""What torch.compile has made in this process, as bytes for another one; knows no file and no run.

Loading such bytes may run any code that is in them, as torch's cache is made of pickles and programs: they must come
from where only those can write whose code may run here.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sys

import torch

from flux_batch.model import layers, rope
from flux_batch.model.optimize import quantize
from flux_batch.model.transformer import Flux


class CompileCache:
    """What was compiled of a transformer; `name` tells which others can use it.

    It is the same for the same torch, Python, kind of device, blocks and source of these. torch looks each graph up by
    its own key, so that bytes of another model would be of no use, and do no harm.
    """

    def __init__(self, model: Flux) -> None:
        device = re.sub(r"[^A-Za-z0-9]+", "-", device_kind(model.img_in.weight.device))
        python = sys.implementation.cache_tag
        self.name = f"torch-{torch.__version__}-{python}-{device}-{digest_of(model)}".replace("+", "-")

    def save(self) -> bytes | None:
        """Return everything that this process has compiled or found in its cache so far; None if that is nothing."""
        saved = torch.compiler.save_cache_artifacts()
        return None if saved is None else saved[0]

    def load(self, data: bytes) -> None:
        """Put what another process has compiled into the cache of this machine. Raises: ValueError if it is damaged."""
        try:
            found = torch.compiler.load_cache_artifacts(data)
        except Exception as error:  # of any class: pickles are read
            raise ValueError(f"not what torch.compile has saved: {error!r}") from error
        if found is None:
            raise ValueError("not what torch.compile has saved")


def device_kind(device: torch.device) -> str:
    """Name the kind of a device as far as compiled code depends on it."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def digest_of(model: Flux) -> str:
    """Return a short name of what a model's blocks are: their layers, sizes and dtype, and the source of all these."""
    blocks = [str(kind[:1]) for kind in model.blocks]
    sources = [inspect.getsource(module) for module in (layers, quantize, rope)]
    text = "\0".join([str(model.img_in.weight.dtype), *blocks, *sources])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
