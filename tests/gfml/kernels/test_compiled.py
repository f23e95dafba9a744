"""Triton compiles every kernel to machine code of an H100 (sm_90), for which no GPU is needed."""

from __future__ import annotations

from typing import Any

import pytest

triton = pytest.importorskip("triton")
FLOATS = (
    "scale",
    "alpha",
    "dot_weight",
    "gravity_weight",
    "eps",
    "decay",
    "mass_decay",
    "keep",
    "old1",
    "new1",
    "old2",
    "new2",
)
POINTERS = {"places": "*i64", "ends": "*i64", "order": "*i64", "rate": "*fp64", "root": "*fp64"}
TABLES = (
    "nodes", "user", "item", "rows", "masses", "values", "table", "gradient", "first", "second", "column", "lse", "dcolumn",
    "dbeta",
)  # fmt: skip
HALVES = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
WIDE = {"D": 64}
PAIRS = {"NORM": True, "PRODUCT": False, "PARAM": 0, "USER": True, "ITEM": True}
TILE = {"M": 16, "N": 16, "D": 32, "FIXED": False}
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, str]]] = {
    "bpr": ("triples", "_pairs", WIDE | PAIRS | {"DOT": 1, "GRAVITY": 0, "FIXED": True}, {"lamb": "fp32"}),
    "gravity, one negative": (
        "triples", "_pairs", WIDE | PAIRS | {"DOT": 0, "GRAVITY": 2, "FIXED": False, "width": 1}, {"lamb": "*fp32"}),
    "mix, products of masses": (
        "triples", "_pairs", WIDE | PAIRS | {"DOT": 2, "GRAVITY": 2, "FIXED": False, "PRODUCT": True, "PARAM": 2}, {"lamb": "*fp32"}),
    "mix_bpr, raw rows, no masses": (
        "triples", "_pairs", WIDE | PAIRS | {"DOT": 1, "GRAVITY": 1, "FIXED": True, "NORM": False, "USER": False, "ITEM": False},
        {"lamb": "fp32"}),
    "sums of rows": ("triples", "_sum_rows", WIDE | {"USER": True, "ITEM": True}, {"scale": "*fp32"}),
    "sums of rows, no masses": ("triples", "_sum_rows", WIDE | {"USER": False, "ITEM": False}, {"scale": "*fp32"}),
    "adamw": ("triples", "_adamw", WIDE, {}),
    "adamw of masses": ("triples", "_adamw", {"D": 1, "d": 1}, {}),
    "attention": ("power_law", "_forward", TILE | {"PRECISION": "tf32x3"}, {"beta": "*fp32"}),
    "attention, bfloat16": ("power_law", "_forward", TILE | {"PRECISION": "tf32", "FIXED": True}, {"beta": "fp32", "half": "*bf16"}),
    "attention, back to keys": (
        "power_law", "_backward_keys", TILE | {"PRECISION": "tf32x3", "WHOLE": True}, {"beta": "*fp32"}),
    "attention, back to queries": ("power_law", "_backward_queries", TILE | {"PRECISION": "tf32x3"}, {"beta": "*fp32"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_kernels_compile(name: str) -> None:
    from importlib import import_module

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    module, kernel, constants, own = CASES[name]
    function, types = getattr(import_module(f"gfml.kernels.{module}"), kernel), dict(POINTERS)
    types |= dict.fromkeys(FLOATS, "fp32") | dict.fromkeys(TABLES, "*fp32")
    types |= dict.fromkeys(HALVES, own.get("half", "*fp32")) | own
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in function.arg_names}
    source = ASTSource(function, signature, constexprs=constants)
    made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4 if module == "power_law" else 1})
    assert len(made.asm["cubin"]) > 1000
