"""The native dtype of a device, by the dtypes that it can multiply."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from flux_batch.model.optimize import dtypes
from flux_batch.model.optimize.dtypes import dtype_name, native_dtype


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((6, 1), torch.float32),
        ((7, 0), torch.float16),
        ((7, 5), torch.float16),
        ((8, 0), torch.bfloat16),
        ((9, 0), torch.bfloat16),
        ((12, 0), torch.bfloat16),
    ],
)
def test_a_gpu_takes_what_its_generation_multiplies(
    capability: tuple[int, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert native_dtype(torch.device("cuda", 0)) == expected


@pytest.mark.parametrize(
    ("machine", "isa", "features", "expected"),
    [
        ("x86_64", "AVX2", {"avx2"}, torch.float32),
        ("x86_64", "AVX512", {"avx512_bw"}, torch.float32),  # torch reports support, but emulates it
        ("x86_64", "AVX512", {"avx512_bw", "avx512_bf16"}, torch.bfloat16),
        ("x86_64", "AVX512", {"amx_bf16"}, torch.bfloat16),
        ("x86_64", "AVX2", {"amx_bf16"}, torch.float32),  # turned off by ATEN_CPU_CAPABILITY
        ("aarch64", "DEFAULT", {"neon"}, torch.float32),
        ("aarch64", "DEFAULT", {"neon", "bf16"}, torch.bfloat16),
    ],
)
def test_a_cpu_takes_bfloat16_only_if_it_multiplies_in_it(
    machine: str, isa: str, features: set[str], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dtypes.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: isa)
    monkeypatch.setattr(dtypes, "has_cpu_feature", lambda name: name in features)
    monkeypatch.setattr(dtypes, "onednn_takes_bfloat16", lambda: True)
    assert native_dtype("cpu") == expected


@pytest.mark.slow
@pytest.mark.parametrize("switch", [{"ATEN_CPU_CAPABILITY": "avx2"}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}])
def test_instructions_that_are_switched_off_do_not_count(switch: dict[str, str]) -> None:
    code = "from flux_batch.model.optimize.dtypes import native_dtype; print(native_dtype('cpu'))"
    found = subprocess.run([sys.executable, "-c", code], env=os.environ | switch, capture_output=True, text=True)
    assert found.stdout.strip() == "torch.float32", found.stderr


def test_features_come_from_linux_where_torch_does_not_say_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(dtypes, "cpu_info", lambda field: {"flags": "avx2 avx512_bf16"}[field])
    assert dtypes.has_cpu_feature("avx512_bf16")
    assert not dtypes.has_cpu_feature("amx_bf16")


def test_a_dtype_is_named_as_settings_spell_it() -> None:
    assert dtype_name(torch.bfloat16) == "bfloat16"
