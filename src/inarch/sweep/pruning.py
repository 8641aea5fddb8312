"""Hyperband (Li et al. 2018, arXiv 1603.06560) as asynchronous successive halving (Li et al. 2020, arXiv 1810.05934).

Optuna's pruner of successive halving decides; the bracket of a trial is a function of its number in the study, so that
a study under another name, or a trial that is taken up again, is judged alike. An attempt that its worker left is no
rival.
"""

import math
import zlib
from typing import Any

from .storage import INDEX, Board, Claim, optuna


class Hyperband:
    """Gives up trials that are behind."""

    def __init__(self, board: Board, *, first_look: int, factor: int, max_epochs: int) -> None:
        self.board = board
        number = max(1, math.floor(math.log(max(1, max_epochs / first_look), factor) + 1e-9) + 1)
        # As many trials for each bracket as give all brackets the same number of epochs.
        self.shares = [math.ceil(number * factor ** (number - 1 - one) / (number - one)) for one in range(number)]
        self.pruners = [
            optuna.pruners.SuccessiveHalvingPruner(
                min_resource=first_look, reduction_factor=factor, min_early_stopping_rate=one
            )
            for one in range(number)
        ]

    def bracket(self, index: int) -> int:
        """The bracket of a trial: the higher, the later its first look."""
        place = zlib.crc32(str(index).encode()) % sum(self.shares)
        return next(one for one in range(len(self.shares)) if place < sum(self.shares[: one + 1]))

    def gives_up(self, claim: Claim) -> bool:
        """Whether the trial is behind its rivals of the same bracket, after what it reported last."""
        own = self.bracket(claim.index)
        rivals = _Rivals(self.board, lambda index: self.bracket(index) == own)
        return bool(self.pruners[own].prune(rivals, claim.frozen()))


class _Rivals(optuna.Study):
    """The study, as if it had the last attempts of some trials alone."""

    def __init__(self, board: Board, is_rival: Any) -> None:
        super().__init__(board.name, board.storage)
        self.is_rival = is_rival

    def get_trials(self, deepcopy: bool = True, states: Any = None) -> list[optuna.trial.FrozenTrial]:
        last = {one.user_attrs[INDEX]: one for one in super().get_trials(deepcopy=deepcopy)}
        return [one for index, one in last.items() if self.is_rival(index) and (states is None or one.state in states)]
