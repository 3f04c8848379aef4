"""Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time
(Wortsman et al., ICML 2022).
"""

from collections.abc import Callable

from weightsmith.core.apply import apply
from weightsmith.core.method import op
from weightsmith.core.weights import Weights
from weightsmith.merge.uniform_soup import uniform_soup


@op(paper="arXiv:2203.05482")
def greedy_soup(models: list[Weights], evaluate: Callable[[Weights], float]) -> Weights:
    r"""Average the models that help: best first, each kept only if the held-out score does not fall.

    $$ S \leftarrow S \cup \{i\} \quad \text{if} \quad
       \mathrm{Val}\big(\tfrac{1}{|S|+1} \textstyle\sum_{j \in S \cup \{i\}} \theta_j\big) \ge
       \mathrm{Val}\big(\tfrac{1}{|S|} \textstyle\sum_{j \in S} \theta_j\big) $$

    Recipe 1 of the paper. Each model is evaluated once alone and each but the first once in a soup.

    Example:
        >>> from weightsmith import Memory
        >>> models = [Memory({"w": torch.tensor([x])}) for x in (0.0, 4.0, 9.0)]
        >>> greedy_soup(models, lambda soup: -abs(float(soup.read("w")) - 3.0)).read("w")
        tensor([2.])
    """
    scored = sorted(((evaluate(model), -place) for place, model in enumerate(models)), reverse=True)
    best, first = scored[0]
    soup = [models[-first]]
    for _, place in scored[1:]:
        candidate = [*soup, models[-place]]
        score = evaluate(apply(uniform_soup, candidate))
        if score >= best:
            soup, best = candidate, score
    return apply(uniform_soup, soup)
