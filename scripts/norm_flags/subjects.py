"""The backbones of the study, with what is trained on each."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import nn

import inarch
from inarch.train.models import load_model

from .texts import load_text_model

ROOT = Path(__file__).parent.parent.parent
DIGITS = tuple(str(digit) for digit in range(10))


@dataclass(frozen=True, slots=True)
class Subject:
    """A backbone and its data."""

    name: str
    model: str
    """`demo`, or a folder of this repository."""
    arrangement: str
    stream: str
    """What a layer does around an MLP, in the words of the formulas."""
    data: str
    """`digits` or `titles`."""

    @property
    def place(self) -> str:
        """What the model is loaded by."""
        return self.model if self.model == "demo" else str(ROOT / self.model)

    def load(self) -> nn.Module:
        """The backbone with a new head."""
        return load_text_model(self.place) if self.data == "titles" else load_model(self.place, DIGITS)


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject("vit", "demo", "pre-norm", "y = x + MLP(LN(x))", "digits"),
        Subject("dinov2", "backbones/dinov2", "pre-norm with layer scale", "y = x + s · MLP(LN(x))", "digits"),
        Subject("swinv2", "backbones/swinv2", "norm on the branch", "y = x + LN(MLP(x))", "digits"),
        Subject("bert", "backbones/bert", "post-norm", "y = LN(x + MLP(x))", "titles"),
    )
}


@cache
def untrained(name: str) -> nn.Module:
    """A backbone to be looked at, loaded once."""
    return SUBJECTS[name].load()


@cache
def sites_of(name: str) -> inarch.Sites:
    """Its sites, found once for all that is asked of them."""
    return inarch.probe(untrained(name))
