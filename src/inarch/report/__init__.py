"""Records of runs -> one self-contained HTML page."""

from .entries import Entry as Entry
from .page import write_report as write_report
from .read import read_entries as read_entries
