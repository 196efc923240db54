"""Muon for weight matrices and Adam for everything else: fewer steps to the same loss than Adam alone.

Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024); the update's size follows Liu et al.,
"Muon is scalable for LLM training" (2025), so that Adam's learning rate serves both.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal; vectors, and what `is_matrix` refuses, get Adam's step.

    Refused are the first and the last convolution, known by the latents' four channels.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        learning_rate: float,
        *,
        weight_decay: float,
        is_matrix: Callable[[Tensor], bool] = lambda parameter: parameter.dim() >= 2 and 4 not in parameter.shape[:2],
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
    ) -> None:
        super().__init__(parameters, {"lr": learning_rate, "weight_decay": weight_decay})
        self.is_matrix, self.momentum, self.betas = is_matrix, momentum, betas

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            matrices = [p for p in parameters if self.is_matrix(p)]
            self.orthogonal_step(matrices, group["lr"])
            chosen = {id(p) for p in matrices}
            self.adam_step([p for p in parameters if id(p) not in chosen], group["lr"])

    def orthogonal_step(self, parameters: list[Tensor], learning_rate: float) -> None:
        """Nesterov momentum, then the nearest orthogonal matrix; matrices of one shape go through together."""
        by_shape = defaultdict(list)
        for parameter in parameters:
            buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
            buffer.lerp_(parameter.grad, 1 - self.momentum)
            update = parameter.grad.lerp(buffer, self.momentum).flatten(1)
            by_shape[update.shape].append((parameter, update))
        for (rows, columns), members in by_shape.items():
            updates = orthogonal(torch.stack([update for _, update in members]))
            size = 0.2 * max(rows, columns) ** 0.5
            for (parameter, _), update in zip(members, updates, strict=True):
                parameter.sub_(update.view_as(parameter), alpha=learning_rate * size)

    def adam_step(self, parameters: list[Tensor], learning_rate: float) -> None:
        """Adam without its bias correction's bookkeeping: the warm-up covers the first steps."""
        first, second = self.betas
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state |= {"mean": parameter.grad.clone(), "square": parameter.grad.square()}
            state["mean"].lerp_(parameter.grad, 1 - first)
            state["square"].lerp_(parameter.grad.square(), 1 - second)
            parameter.addcdiv_(state["mean"], state["square"].sqrt().add_(1e-8), value=-learning_rate)


def orthogonal(matrices: Tensor) -> Tensor:
    """(count, rows, columns): each with its singular values brought near 1, by five Newton-Schulz steps."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)
