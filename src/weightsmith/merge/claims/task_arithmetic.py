"""What "Editing models with task arithmetic" promises, tried on digits."""

from weightsmith import apply
from weightsmith.lab import claim
from weightsmith.merge import task_arithmetic


@claim("merging two experts keeps both skills, where each expert forgets the other's", where="section 4", seconds=10)
def adds_skills(lab):
    base, experts = lab.generalist(), {task: lab.expert(task) for task in ("turned", "negative")}
    merged = apply(task_arithmetic, list(experts.values()), base=base, scale=0.4)
    worst = {name: min(lab.accuracy(w, t) for t in experts) for name, w in {**experts, "merged": merged}.items()}
    return worst["merged"] > max(worst["turned"], worst["negative"]) + 0.05, worst


@claim("a negated task vector forgets its task, with little change on a control task", where="section 3", seconds=10)
def forgets_when_negated(lab):
    base, expert, control = lab.generalist(), lab.expert("turned"), "mirrored"
    edits = [apply(task_arithmetic, [expert], base=base, scale=-k / 20) for k in range(1, 21)]
    floor = 0.95 * lab.accuracy(base, control, "validation")
    kept = [edit for edit in edits if lab.accuracy(edit, control, "validation") >= floor]
    edited = min(kept, key=lambda edit: lab.accuracy(edit, "turned", "validation"), default=base)
    fall = {f"fall_{t}": lab.accuracy(base, t) - lab.accuracy(edited, t) for t in ("turned", control)}
    return fall["fall_turned"] > 0.1 and fall["fall_turned"] > 2 * fall[f"fall_{control}"], fall
