"""The composition blocks: `import inarch.compat.composition as ac`."""

from ..compose import Average as Average
from ..compose import BatchSplit as BatchSplit
from ..compose import Fuse as Fuse
from ..compose import MultiTask as MultiTask
from ..compose import Parallel as Parallel
from ..compose import Split as Split
from ..compose import Stack as Stack
