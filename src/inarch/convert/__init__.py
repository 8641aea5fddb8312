"""Readers and writers of other libraries' adapter folders: one file per format."""

from . import adapterhub_record as adapterhub_record
from . import peft as peft
from . import peft_head as peft_head
from . import peft_record as peft_record
from .adapterhub import Converted as Converted
from .adapterhub import StoredHead as StoredHead
from .adapterhub import read as read
from .adapterhub_fusion import is_fusion as is_fusion
from .adapterhub_fusion import read_fusion as read_fusion
from .adapterhub_record import RECORD as RECORD
from .adapterhub_record import RECORDS as RECORDS
from .adapterhub_record import is_adapterhub as is_adapterhub
from .adapterhub_write import write_adapterhub as write_adapterhub
from .peft_record import is_peft as is_peft
from .peft_write import write_peft as write_peft
