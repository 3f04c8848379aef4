"""What "Task Singular Vectors" promises, tried on digits."""

import torch

from weightsmith.lab import claim
from weightsmith.merge import task_arithmetic, tsv_m
from weightsmith.merge.claims.iso_c import TASKS, best


@claim("it beats task arithmetic, each at its best scale", where="Table 1", seconds=20)
def beats_task_arithmetic(lab):
    base, experts = lab.generalist(), [lab.expert(task) for task in TASKS]
    seen = {
        "tsv_m": best(lab, tsv_m, base, experts, [k / 5 for k in range(1, 11)]),
        "task_arithmetic": best(lab, task_arithmetic, base, experts, [k / 20 for k in range(1, 11)]),
    }
    return seen["tsv_m"] > seen["task_arithmetic"], seen


@claim("the changes of fine-tuning are low-rank: a few singular vectors keep the skill", where="section 3", seconds=10)
def changes_are_low_rank(lab):
    base, seen = lab.generalist(), {"expert": 0.0, "tenth": 0.0}
    for task in TASKS:
        expert = lab.expert(task)
        live = lab.module(expert)
        with torch.no_grad():
            for name, weight in live.named_parameters():
                if weight.ndim == 2:
                    u, s, vh = torch.linalg.svd(weight - base.read(name), full_matrices=False)
                    rank = max(1, len(s) // 10)
                    weight.copy_(base.read(name) + (u[:, :rank] * s[:rank]) @ vh[:rank])
        seen["expert"] += lab.accuracy(expert, task) / len(TASKS)
        seen["tenth"] += lab.accuracy(live, task) / len(TASKS)
    seen["kept"] = seen["tenth"] / seen["expert"]
    return seen["kept"] >= 0.97, seen
