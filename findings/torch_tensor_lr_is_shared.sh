#!/usr/bin/env bash
# torch 2.15.0: parameter groups that take the optimizer's rate share one tensor, so schedules by group are lost.
#
# Behaviour: capturable and compiled optimizers want the learning rate as a tensor. AdamW([{..}, {..}], lr=torch.tensor(0.1))
# puts the same tensor into both groups, and schedulers fill it in place: LambdaLR with the factors 1 and 0.1 gives both groups
# 0.01, the last group's rate. get_last_lr() agrees with it. With lr=0.1 they have 0.1 and 0.01.
# Good guess: a tensor is a number that can change under a recording; every group has its own, as with floats.
# Who is hurt: fine-tuning with a slower backbone, after the switch to CUDA graphs or to a compiled step: no error, another
# rate for all groups but the last. Only a tensor of its own for each group, group by group, helps.
# Output seen: float [0.1, 0.01], tensor [0.01, 0.01], a tensor each [0.1, 0.01].
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check torch==2.15.0
"$folder/env/bin/python" - <<'PYTHON'
import torch
from torch.optim.lr_scheduler import LambdaLR


def rates(lr, own=({}, {})):
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], **more} for more in own]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    schedule = LambdaLR(optimizer, [lambda epoch: 1.0, lambda epoch: 0.1])
    assert [float(rate) for rate in schedule.get_last_lr()] == [float(group["lr"]) for group in optimizer.param_groups]
    return [round(float(group["lr"]), 6) for group in optimizer.param_groups]


found = {
    "float": rates(0.1),
    "tensor": rates(torch.tensor(0.1)),
    "a tensor each": rates(0.1, ({"lr": torch.tensor(0.1)}, {"lr": torch.tensor(0.1)})),
}
print(found)
assert found == {"float": [0.1, 0.01], "tensor": [0.01, 0.01], "a tensor each": [0.1, 0.01]}
PYTHON
