"""What can be known of a configuration before training."""

from .examine import examine as examine
from .examine import model_facts as model_facts
from .examine import run_of as run_of
from .facts import Data as Data
from .facts import Evidence as Evidence
from .facts import Memory as Memory
from .facts import ModelFacts as ModelFacts
from .facts import SiteReport as SiteReport
from .facts import Stored as Stored
from .facts import Training as Training
from .findings import Finding as Finding
from .findings import rules as rules
from .measure import difference as difference
from .proof import Proof as Proof
from .proof import prove as prove
from .repair import Repair as Repair
from .repair import wiring_repairs as wiring_repairs
from .report import PROJECTION_HEADERS as PROJECTION_HEADERS
from .report import SITE_HEADERS as SITE_HEADERS
from .report import Report as Report
from .report import evidence_lines as evidence_lines
from .report import impossible as impossible
from .report import memory_lines as memory_lines
from .report import projection_rows as projection_rows
from .report import report as report
from .report import site_rows as site_rows
