"""The names of the library `adapters` over inarch: `import inarch.compat as adapters`.

Only names are here; every call is one of `inarch.Adapters`, which `docs/migrate.md` tells. The model's class stays as
it is: `init` puts methods on the instance. Where transformers has a method of the same name (`add_adapter`,
`load_adapter`, `delete_adapter`, `active_adapters`), calls in its form still reach it.
"""

from . import composition as composition
from .composition import Average as Average
from .composition import BatchSplit as BatchSplit
from .composition import Fuse as Fuse
from .composition import MultiTask as MultiTask
from .composition import Parallel as Parallel
from .composition import Split as Split
from .composition import Stack as Stack
from .configuration import CONFIGS as CONFIGS
from .configuration import ConfigUnion as ConfigUnion
from .methods import METHODS as METHODS
from .models import AdapterSetup as AdapterSetup
from .models import AdapterTrainer as AdapterTrainer
from .models import AutoAdapterModel as AutoAdapterModel
from .models import init as init
from .models import load_model as load_model

globals().update(CONFIGS)
