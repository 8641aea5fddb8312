"""Composition of adapters: the blocks, and the one function that runs them."""

from .blocks import Average as Average
from .blocks import BatchSplit as BatchSplit
from .blocks import Block as Block
from .blocks import Fuse as Fuse
from .blocks import MultiTask as MultiTask
from .blocks import Parallel as Parallel
from .blocks import Setup as Setup
from .blocks import Split as Split
from .blocks import Stack as Stack
from .blocks import from_data as from_data
from .blocks import names as names
from .blocks import to_data as to_data
from .route import check_runnable as check_runnable
from .route import keep_only as keep_only
from .route import last as last
from .route import run as run
