"""The residual sites of a model: finding them, and checking a layout that names them."""

from .inputs import Inputs as Inputs
from .inputs import given_inputs as given_inputs
from .inputs import with_small_image as with_small_image
from .known import Known as Known
from .known import RunsKnown as RunsKnown
from .layout import resolve as resolve
from .native import Unnested as Unnested
from .native import nesting_encoders as nesting_encoders
from .native import unfused as unfused
from .probe import ProbeError as ProbeError
from .probe import likely_inputs as likely_inputs
from .probe import probe as probe
from .probe import probe_now as probe_now
from .probe import synthesise as synthesise
