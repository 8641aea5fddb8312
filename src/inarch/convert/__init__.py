"""Readers of other libraries' adapter folders: one file per format."""

from .adapterhub import RECORD as RECORD
from .adapterhub import RECORDS as RECORDS
from .adapterhub import WEIGHTS as WEIGHTS
from .adapterhub import Converted as Converted
from .adapterhub import StoredHead as StoredHead
from .adapterhub import is_adapterhub as is_adapterhub
from .adapterhub import read as read
