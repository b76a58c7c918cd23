"""Self-tuning networks: weights that answer hyperparameters, so that both are learnt in one run."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import GraftError

Loss = Callable[[list[Tensor], Tensor], Tensor]


class BestResponse(nn.Module):
    """w(h) = w_0 + diag(V (h - h_start)) w_1 for each weight: how it answers the hyperparameters h [H].

    The rows of w_1, of the shape of w, are scaled by V (h - h_start) [rows], V [rows, H]. w_0 is the weight itself, w_1
    is random with its deviation, and V small: twice the memory of the weights. For a linear network with an L2 penalty
    on its Jacobian the exact best response argmin_w L_T(w, h) scales rows in such a way, the paper shows.

    weights  parameters, such as those of an adapter
    hypers   h to begin with, in a space without bounds: logarithms, logits
    scale    s to begin with, the deviation of the hyperparameters that training draws

    Self-Tuning Networks: Bilevel Optimization of Hyperparameters using Structured Best-Response Functions. MacKay et
    al., 2019. https://arxiv.org/abs/1903.03088 As in the authors' code (github.com/asteroidhouse/self-tuning-networks),
    which scales the outputs of a layer, and so its weights, and draws h for each example; here one h is drawn for a
    batch, as there of hyperparameters that a batch shares.
    """

    start: Tensor

    def __init__(self, weights: Sequence[Tensor], hypers: Tensor, scale: float = 0.5):
        super().__init__()
        if hypers.dim() != 1 or not weights or scale <= 0:
            raise GraftError(
                f"a best response needs weights, a vector of hyperparameters and a scale above 0, not {len(weights)} "
                f"weights, hyperparameters {list(hypers.shape)} and scale={scale}"
            )
        self.weights = list(weights)
        self.hypers = nn.Parameter(hypers.detach().clone())
        self.raw = nn.Parameter(torch.full_like(self.hypers, math.log(math.expm1(scale))))
        self.register_buffer("start", hypers.detach().clone())
        spread = (max(float(w.detach().square().mean()) ** 0.5, 0.01) for w in self.weights)
        self.others = nn.ParameterList(s * torch.randn_like(w) for s, w in zip(spread, self.weights))
        self.gates = nn.ParameterList(0.01 * torch.randn(len(w), len(hypers)).to(w) for w in self.weights)

    @property
    def scale(self) -> Tensor:
        """s [H]."""
        return F.softplus(self.raw)

    def forward(self, h: Tensor) -> list[Tensor]:
        """w(h)."""
        return [
            w + (V @ (h - self.start).to(V)).view(-1, *[1] * (w.dim() - 1)) * other
            for w, V, other in zip(self.weights, self.gates, self.others)
        ]

    def drawn(self) -> Tensor:
        """h around where it is now: hypers + s e with e ~ N(0, I)."""
        return self.hypers + self.scale * torch.randn_like(self.hypers)

    def entropy(self) -> Tensor:
        """Of that distribution, sum_i log(s_i sqrt(2 pi e))."""
        return (self.scale * math.sqrt(2 * math.pi * math.e)).log().sum()


def self_tune(
    net: BestResponse,
    train: Loss,
    validation: Loss,
    *,
    rounds: int,
    train_steps: int = 2,
    rate: float = 1e-2,
    hyper_rate: float = 3e-3,
    entropy: float = 1e-5,
) -> list[Tensor]:
    """Learn weights, their response and the hyperparameters in one run; the hyperparameters after each round.

    A round is `train_steps` of Adam at `rate` on L_T(w(h), h), h drawn anew each time, in w_0, w_1 and V; and one step
    of Adam at `hyper_rate` on L_V(w(h), h) - `entropy` times the entropy, h drawn, in the mean of h and in s. No
    derivative of L_T in h is taken, so that h may stand for what has none, such as dropout. At the end the weights are
    w(h), and the response begins anew there.

    train, validation  give L_T and L_V from the weights, in the order of `net.weights`, and h;
                       torch.func.functional_call(model, dict(zip(names, weights)), inputs) runs a model with them
    """
    inner = torch.optim.Adam([*net.weights, *net.others, *net.gates], lr=rate)
    outer, schedule = torch.optim.Adam([net.hypers, net.raw], lr=hyper_rate), []
    for _ in range(rounds):
        for _ in range(train_steps):
            h = net.drawn().detach()
            inner.zero_grad()
            train(net(h), h).backward()
            inner.step()
        h = net.drawn()
        outer.zero_grad()
        (validation(net(h), h) - entropy * net.entropy()).backward()
        outer.step()
        schedule.append(net.hypers.detach().clone())
    inner.zero_grad()
    with torch.no_grad():
        for w, value in zip(net.weights, net(net.hypers)):
            w.copy_(value)
        net.start.copy_(net.hypers)
    return schedule
