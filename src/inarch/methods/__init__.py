"""The adapter methods: one file each."""

from .method import AbstractMethod as AbstractMethod
from .method import Frozen as Frozen
from .method import LinearMethod as LinearMethod
from .method import Placement as Placement
from .method import SublayerMethod as SublayerMethod
from .method import layer_number as layer_number
from .method import renumber as renumber
from .ports_input import InputMethod as InputMethod
from .registry import AdapterConfig as AdapterConfig
from .registry import ConfigLike as ConfigLike
from .registry import method_of as method_of
from .registry import methods as methods
from .registry import placements as placements
from .registry import preset_names as preset_names
from .registry import presets as presets
from .registry import read_config as read_config
