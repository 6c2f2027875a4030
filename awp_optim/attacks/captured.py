"""Attacks replayed as CUDA graphs."""

from __future__ import annotations

from torch import Tensor, nn

from awp_optim._cuda_graphs.graphs import Graphs
from awp_optim._cuda_graphs.keys import module_key
from awp_optim._utils.checks import describe
from awp_optim.attacks.base import Attack
from awp_optim.attacks.oracle import Model

__all__ = ["Captured", "attack_id", "unwrap"]


class Captured:
    """An attack that runs as one CUDA graph: ``Captured(PGD(steps=20))(model, x, y)``.

    On a GPU, the kernels of a small network take less time than their launches; a graph launches
    them all at once. The third call with the same model in the same modes and with inputs of the
    same shape is captured. Later calls replay it, with new random numbers. On other devices, for
    models that are not an ``nn.Module``, and if the capture fails, the attack runs eagerly.

    Hooks on modules and Python code in the model's forward run when the attack is captured, not
    when it is replayed.

    Args:
        attack: an attack of this package.
        cuda_graph: True, False or "auto"; True raises an error if a graph is not possible.

    Raises:
        TypeError: ``attack`` is not one of this package's.
        ValueError: ``cuda_graph`` is not one of these.

    >>> import torch
    >>> from awp_optim.attacks import PGD
    >>> attack = Captured(PGD(eps=0.1, step_size=0.05))
    >>> attack(lambda x: x * 3, torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
    tensor([[0.4000, 0.6000]])
    """

    def __init__(self, attack: Attack, cuda_graph: bool | str = "auto") -> None:  # noqa: FBT001
        if not isinstance(attack, Attack):
            raise TypeError(f"attack must be one of this package's, got {describe(attack)}")
        self.attack = attack
        self._cuda_graph = cuda_graph
        self._graphs = Graphs(cuda_graph, f"the attack {attack}")

    @property
    def model_mode(self) -> str:
        """The mode in which the model is attacked."""
        return self.attack.model_mode

    def __call__(self, model: Model, x: Tensor, y: Tensor | None) -> Tensor:
        """Perturb a batch, like :meth:`Attack.__call__`.

        Raises:
            ValueError: see there; or ``cuda_graph=True`` and a graph is not possible.
            CaptureError: ``cuda_graph=True`` and the attack cannot be captured.
        """
        self.attack.check_inputs(x, y)
        if x.numel() == 0 or not self._graphs.applies_to(x.device):
            return self.attack(model, x, y)
        if not isinstance(model, nn.Module):  # a function's weights are unknown
            if self._cuda_graph is True:
                raise ValueError(
                    "cuda_graph=True needs a model whose weights are known: wrap the function in "
                    f"an nn.Module, got {describe(model)}"
                )
            return self.attack(model, x, y)

        def function(x: Tensor, y: Tensor | None = None) -> tuple[Tensor]:
            return (self.attack(model, x, y),)

        inputs = (x.detach(),) if y is None else (x.detach(), y.detach())
        (x_adv,) = self._graphs(function, inputs, module_key(model))
        return x_adv

    def __repr__(self) -> str:
        return f"Captured({self.attack})"


def unwrap(attack: object) -> object:
    """The attack inside a :class:`Captured`; any other object unchanged."""
    return attack.attack if isinstance(attack, Captured) else attack


def attack_id(attack: object) -> str:
    """A text for an attack that is the same in every run; the qualified name of a function."""
    if isinstance(attack, (Attack, Captured)):
        return repr(attack)
    return str(getattr(attack, "__qualname__", type(attack).__qualname__))
