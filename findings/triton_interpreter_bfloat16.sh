#!/usr/bin/env bash
# triton 3.9.0: in its interpreter the sum of bfloat16 numbers is a sum of their bit patterns, and storing them truncates.
#
# Behaviour: TRITON_INTERPRET=1, tl.sum of 4,096 bfloat16 ones is 0.0, of 1,024 times 0.001 it is 9.9e-32: the 16 bits are added
# as integers. tl.sum of float16 is right. And .to(tl.bfloat16) cuts the lower 16 bits off: 1.007 becomes 1.0, where torch, and
# a GPU, round to the nearest, 1.0078125.
# Good guess: about 4,096 and 1.02, at worst with bfloat16's rounding; the interpreter exists to give a kernel's numbers.
# Who is hurt: whoever checks 16-bit kernels without a GPU: right kernels fail, and tolerances that are widened for the
# truncation, twice the error of rounding and always toward zero, hide real mistakes.
# Output seen: sums 0.0 and 9.86e-32 (float16: 4096.0), conversion 1.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check torch==2.15.0 triton==3.9.0 numpy
# The interpreter reads the source of a kernel from its file.
cat > "$folder/kernels.py" <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def total(x, y, n: tl.constexpr):
    tl.store(y, tl.sum(tl.load(x + tl.arange(0, n))))


@triton.jit
def converted(x, y, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y + i, tl.load(x + i).to(tl.bfloat16))


def sum_of(count, value, kind):
    y = torch.empty(1)
    total[(1,)](torch.full((count,), value, dtype=kind), y, count)
    return y.item()


short = torch.empty(2, dtype=torch.bfloat16)
converted[(1,)](torch.tensor([1.007, 1.0]), short, 2)
sums = sum_of(4096, 1.0, torch.bfloat16), sum_of(1024, 0.001, torch.bfloat16), sum_of(4096, 1.0, torch.float16)
print(sums, short[0].item(), torch.tensor(1.007).bfloat16().item())
assert sums[0] == 0.0 and sums[1] < 1e-30 and sums[2] == 4096.0
assert short[0].item() == 1.0 and torch.tensor(1.007).bfloat16().item() == 1.0078125
PYTHON
TRITON_INTERPRET=1 "$folder/env/bin/python" "$folder/kernels.py"
