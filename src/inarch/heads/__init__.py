"""Task heads: the part of a model that is trained with an adapter and saved with it.

A model has one of its own, or it is given flexible ones (`Adapters.add_head`), of the kinds in `kinds.py`.
"""

from .custom import register as register
from .flexible import name_at as name_at
from .flexible import path_of as path_of
from .foreign import read_foreign as read_foreign
from .foreign import read_foreign_settings as read_foreign_settings
from .foreign_write import model_class as model_class
from .foreign_write import write_foreign as write_foreign
from .kinds import KINDS as KINDS
from .kinds import HeadConfig as HeadConfig
from .kinds import head_data as head_data
from .kinds import read_head as read_head
from .layers import Head as Head
from .outputs import HeadOutput as HeadOutput
from .outputs import MultiHeadOutput as MultiHeadOutput
from .states import States as States
from .states import decodes as decodes
from .task_head import id2label as id2label
from .task_head import task_head as task_head
from .trained import TrainedHeads as TrainedHeads
