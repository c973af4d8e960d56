"""The overhead of the first image of a process."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
from flux_batch import FluxImagePipeline
pipe = FluxImagePipeline.from_pretrained("demo", device="cpu", torch_dtype="float32", compile=False)
pipe("a cat", height=16, width=16, num_inference_steps=1)
print([name for name in ("torch._dynamo", "sympy", "transformers.modeling_utils", "ray") if name in sys.modules])
"""


def test_it_imports_neither_a_compiler_nor_other_networks() -> None:
    """Each of these takes as long to import as torch."""
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr
