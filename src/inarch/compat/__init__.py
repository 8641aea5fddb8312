"""The names of the library `adapters` over inarch: `import inarch.compat as adapters`.

Only names are here; every call is one of `inarch.Adapters`, which `docs/migrate.md` tells. The model's class stays as
it is: `init` puts methods on the instance. Where transformers has a method of the same name (`add_adapter`,
`load_adapter`, `delete_adapter`, `active_adapters`), calls in its form still reach it. A name of that library that is
not here is refused with what to write instead (`refused.py`).
"""

from typing import Any

from . import composition as composition
from .composition import AdapterCompositionBlock as AdapterCompositionBlock
from .composition import Average as Average
from .composition import BatchSplit as BatchSplit
from .composition import Fuse as Fuse
from .composition import MultiTask as MultiTask
from .composition import Parallel as Parallel
from .composition import Split as Split
from .composition import Stack as Stack
from .composition import parse_composition as parse_composition
from .configuration import ADAPTER_CONFIG_MAP as ADAPTER_CONFIG_MAP
from .configuration import ADAPTERFUSION_CONFIG_MAP as ADAPTERFUSION_CONFIG_MAP
from .configuration import CONFIGS as CONFIGS
from .configuration import DEFAULT_ADAPTER_CONFIG as DEFAULT_ADAPTER_CONFIG
from .configuration import DEFAULT_ADAPTERFUSION_CONFIG as DEFAULT_ADAPTERFUSION_CONFIG
from .configuration import AdapterConfig as AdapterConfig
from .configuration import ConfigUnion as ConfigUnion
from .heads import BertStyleMaskedLMHead as BertStyleMaskedLMHead
from .heads import BiaffineParsingHead as BiaffineParsingHead
from .heads import CausalLMHead as CausalLMHead
from .heads import ClassificationHead as ClassificationHead
from .heads import ImageClassificationHead as ImageClassificationHead
from .heads import MultiHeadOutput as MultiHeadOutput
from .heads import MultiLabelClassificationHead as MultiLabelClassificationHead
from .heads import MultipleChoiceHead as MultipleChoiceHead
from .heads import PredictionHead as PredictionHead
from .heads import QuestionAnsweringHead as QuestionAnsweringHead
from .heads import Seq2SeqLMHead as Seq2SeqLMHead
from .heads import TaggingHead as TaggingHead
from .methods import METHODS as METHODS
from .models import MODELS as MODELS
from .models import AdapterSetup as AdapterSetup
from .models import AutoAdapterModel as AutoAdapterModel
from .models import init as init
from .models import load_model as load_model
from .refused import NAMES, not_here
from .trainer import AdapterTrainer as AdapterTrainer
from .trainer import Seq2SeqAdapterTrainer as Seq2SeqAdapterTrainer
from .training import AdapterArguments as AdapterArguments
from .training import setup_adapter_training as setup_adapter_training

globals().update(CONFIGS)
globals().update(MODELS)


def __getattr__(name: str) -> Any:
    if name in NAMES:
        raise not_here(name, NAMES[name])
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
