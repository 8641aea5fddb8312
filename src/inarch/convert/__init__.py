"""Readers and writers of other libraries' adapter folders: one file per format."""

from . import adapterhub as adapterhub
from . import peft as peft
from .adapterhub import RECORD as RECORD
from .adapterhub import RECORDS as RECORDS
from .adapterhub import Converted as Converted
from .adapterhub import StoredHead as StoredHead
from .adapterhub import is_adapterhub as is_adapterhub
from .adapterhub import read as read
from .adapterhub_fusion import is_fusion as is_fusion
from .adapterhub_fusion import read_fusion as read_fusion
from .adapterhub_write import write_adapterhub as write_adapterhub
from .peft import is_peft as is_peft
from .peft_write import write_peft as write_peft
