"""How many residual sites a layer has, told from its source and its modules' names: independent of any trace.

Two counts: sums of a stream and a branch in the `forward` of the layer and of the modules it is made of, by the names
of the variables; and the topmost modules inside it that are called attentions, mixers or MLPs. Neither is always right.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Container
from functools import cache

from torch import nn

_STREAM = re.compile(
    r"residual\w*|\w*hidden_states\w*|input_tensor\w*|shortcut\w*|identity|skip\w*|x|src|inputs?|query|tgt|h|\w*_residual|hidden_state|states?|out|output|queries|embeddings?"
)
_NO_BRANCH = re.compile(r"mask|bias|pos|rope|cos|sin|loss|eps|score|weight|logit|embed|prob|freq|offset|index|shift")
_MIXER = re.compile(
    r"Attention|Attn|Mixer|Mamba|SSM|DeltaNet|RecurrentBlock|ShortConv|ConvModule|ConvolutionModule|LinearRecurrent|SelfMixing|"
    r"HyenaOperator|FourierTransform|TimeMix|Rwkv\w*Attention|LightConv|LConv|Pooling|RecurrentGemma\w*Block|GatedDelta|KDA|xLSTM|MLA\b|MSA\b"
)
_MLP = re.compile(
    r"MLP|Mlp|FeedForward|Feedforward|FFN|Ffn|FFW|MoE|Moe|MOE|SparseBlock|Intermediate$|BlockSparse|SwiGLU|"
    r"DenseReluDense|LayerFF|FeedForwardNetwork|PositionwiseFF|GatedMLP|ChannelMix|Experts$|GLU"
)
_PAIRS = (
    ("fc1", "fc2"),
    ("linear1", "linear2"),
    ("wi", "wo"),
    ("up_proj", "down_proj"),
    ("lin1", "lin2"),
    ("dense1", "dense2"),
    ("linear_1", "linear_2"),
    ("ff1", "ff2"),
    ("pwconv1", "pwconv2"),
    ("w1", "w2"),
)


def sums(module: nn.Module, ran: Container[nn.Module]) -> int:
    """Residual sums by variable name, in the forwards of a module and of those of its parts that ran."""
    own = _sums_of_class(type(module))
    if own and (_MIXER.search(type(module).__name__) or _MLP.search(type(module).__name__)):
        return own
    return own + sum(sums(child, ran) for child in module.children() if _took_part(child, ran))


def sublayers(module: nn.Module, ran: Container[nn.Module]) -> int:
    """The topmost mixers and MLPs inside a layer that ran, by class name."""
    found = 0
    for child in module.children():
        name = type(child).__name__
        if not _took_part(child, ran):
            continue
        if _MIXER.search(name) or _MLP.search(name):
            inner = sublayers(child, ran)
            both = bool(_MIXER.search(name)) and inner > 1
            found += inner if both else 1
        else:
            found += sublayers(child, ran)
    names = {name for name, _ in module.named_children()}
    return found + sum(set(pair) <= names for pair in _PAIRS)


def _took_part(module: nn.Module, ran: Container[nn.Module]) -> bool:
    return any(part in ran for part in module.modules())


@cache
def _sums_of_class(kind: type) -> int:
    if kind.__module__.startswith("torch."):
        return 0
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, TypeError, SyntaxError):
        return 0
    return sum(_is_residual(node) for node in ast.walk(tree))


def _is_residual(node: ast.AST) -> bool:
    if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add):
        left, right = node.target, node.value
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = node.left, node.right
    else:
        return False
    names = [_name(left), _name(right)]
    if any(name is None for name in names):
        return False
    if any(_NO_BRANCH.search(name) for name in names if name):
        return False
    return any(_STREAM.fullmatch(name) for name in names if name)


def _name(node: ast.AST) -> str | None:
    """The variable that an operand is, or is made from by a call or a factor; None for a number."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=attr)):
            return attr
        case ast.Call(func=ast.Attribute(value=value)):
            return _name(value)
        case ast.Subscript(value=value):
            return _name(value)
        case ast.BinOp(op=ast.Mult(), left=left, right=right):
            names = [name for name in (_name(left), _name(right)) if name]
            return next((name for name in names if _STREAM.fullmatch(name)), names[0] if names else None)
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return _name(left) or _name(right)
        case ast.Attribute(attr=attr):
            return attr
    return None
