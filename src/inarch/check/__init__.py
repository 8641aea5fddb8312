"""What can be known of a configuration before training."""

from .proof import Proof as Proof
from .proof import fixes as fixes
from .proof import prove as prove
from .report import Finding as Finding
from .report import Report as Report
from .report import SiteReport as SiteReport
from .report import report as report
