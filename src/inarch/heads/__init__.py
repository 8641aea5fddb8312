"""Task heads: the part of a model that is trained with an adapter and saved with it."""

from .task_head import id2label as id2label
from .task_head import task_head as task_head
from .trained import TrainedHeads as TrainedHeads
