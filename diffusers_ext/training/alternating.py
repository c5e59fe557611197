"""Training of several networks in turns: a student and the network that judges it, and whatever else learns beside them.

A round is one optimiser step of the trainer: every player takes its turns, in order, e.g. five of the fake score and one of the student.
In a turn only that player's parameters require gradients, so that its loss may run through the others for nothing but their
value, and batches are accumulated, exchanged between processes and clipped for it alone. Checkpoints fall between rounds,
which is why a resumed run never has to know whose turn it was.

Accelerate counts accumulation once for all models and data-parallel wrappers expect every parameter in every backward pass; here
the gradients of a turn are averaged over processes by one message instead. Sharded optimisers (FSDP, DeepSpeed) are not supported.
"""

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from .ema import WeightAverage
from .trainer import Stateful, Trainer


# from the module and a batch to a scalar
Loss = Callable[[nn.Module, Any], torch.Tensor]


@dataclass(frozen=True)
class Player:
    """Parameters that learn together.

    Args:
        names: Names of its parameters in the trained module.
        learning_rate: Full learning rate; the schedule is the same for all players.
        turns: Optimiser steps a round, 1 or more.
        averaged: Whether a moving average of it is kept and exported.
        after_turn: Called after each of its optimiser steps, e.g. to move weights; the same on all processes.
    """

    names: frozenset[str]
    learning_rate: float
    turns: int = 1
    averaged: bool = False
    after_turn: Callable[[], None] | None = None


def player_of(module: nn.Module, prefix: str, learning_rate: float, turns: int = 1, averaged: bool = False) -> Player:
    """The player of all trainable parameters below a submodule, e.g. "fake" of `nn.ModuleDict({"student": …, "fake": …})`.

    Raises:
        ValueError: If there are none.
    """
    names = frozenset(
        name for name, value in module.named_parameters() if value.requires_grad and name.startswith(f"{prefix}.")
    )
    if not names:
        raise ValueError(f"prefix={prefix!r} has no trainable parameters in {type(module).__name__}")
    return Player(names, learning_rate, turns, averaged)


class AlternatingTrainer(Trainer):
    """Trains the players of one module in turns.

    `fit` takes batches as a mapping from player to its turns, each a list of batches, one a forward pass, and losses as a
    mapping from player to its loss. Each loss is logged as "<player>_loss".

    Args:
        args: Arguments of `add_training_arguments`.
        accelerator: From `make_accelerator`.
        module: Holds the parameters of all players.
        players: By name, in the order of their turns. Each trainable parameter belongs to one.
        states: What else belongs into a checkpoint, by name.

    Raises:
        ValueError: If the players do not share out the trainable parameters, one has no turn, or none is averaged.
        CheckpointError: As in `Trainer`.
    """

    def __init__(
        self,
        args: Namespace,
        accelerator: Accelerator,
        module: nn.Module,
        players: Mapping[str, Player],
        states: Mapping[str, Stateful] | None = None,
    ):
        self.players = dict(players)
        self.loss_names = tuple(f"{name}_loss" for name in players)
        trainable = {name for name, value in module.named_parameters() if value.requires_grad}
        owners: dict[str, list[str]] = {name: [] for name in trainable}
        for title, player in players.items():
            if player.turns < 1:
                raise ValueError(f"turns={player.turns} of {title} must be 1 or more")
            for name in player.names:
                owners.setdefault(name, []).append(title)
        for name, titles in sorted(owners.items()):
            if len(titles) != 1 or name not in trainable:
                found = f"belongs to {', '.join(titles) or 'no player'}" if name in trainable else "is not trainable"
                raise ValueError(f"players: parameter {name} {found}; give each trainable parameter to exactly one")
        if args.use_ema and not any(player.averaged for player in players.values()):
            raise ValueError("use_ema=True, but no player is averaged; mark one, or give --no-use_ema")
        super().__init__(args, accelerator, module, states)

    def own_turns(self, player: str) -> range:
        """Numbers of a player's turns in a round, e.g. to name the streams of its batches."""
        return range(self.players[player].turns)

    def _new_average(self) -> WeightAverage:
        names = frozenset().union(*(player.names for player in self.players.values() if player.averaged))
        return WeightAverage(self.module, self.args.ema_decay, names)

    def _own(self, player: Player) -> list[nn.Parameter]:
        # in the order of the module, which is the same on all processes
        return [value for name, value in self._named.items() if name in player.names]

    def _parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": self._own(player), "lr": player.learning_rate} for player in self.players.values()]

    def _prepare(self, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = self.module, self.accelerator.prepare(optimizer)
        if self.accelerator.num_processes > 1:
            for value in self._named.values():
                value.data.copy_(broadcast(value.data))

    def _optimise(self, batches: Any, loss_of: Any) -> torch.Tensor:
        factor = self._begin_step()
        for group, player in zip(self.optimizer.param_groups, self.players.values()):
            group["lr"] = player.learning_rate * factor
        means = []
        for title, player in self.players.items():
            turns = [self._turn(player, passes, loss_of[title]) for passes in batches[title]]
            means.append(torch.stack(turns).mean())
        for value in self._named.values():
            value.requires_grad_(True)
        self._end_step()
        return torch.stack(means)

    def _turn(self, player: Player, passes: Sequence[Any], loss_of: Loss) -> torch.Tensor:
        # set before the forward pass: a flag that changes between forward and backward loses gradients without a word
        for name, value in self._named.items():
            value.requires_grad_(name in player.names)
        total = torch.zeros((), device=self.accelerator.device)
        for batch in passes:
            with self.accelerator.autocast():
                loss = loss_of(self.module, batch) / len(passes)
            self.accelerator.backward(loss)
            total += loss.detach().to(total)
        own = self._own(player)
        self._average_gradients(own)
        self.accelerator.clip_grad_norm_(own, self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if player.after_turn:
            player.after_turn()
        return total

    def _average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        if self.accelerator.num_processes == 1:
            return
        gradients = [value.grad for value in parameters if value.grad is not None]
        mean = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(part.view_as(gradient))
