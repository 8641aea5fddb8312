"""Labelled images from anywhere, as a model reads them. Needs the extra `train`."""

from .examples import Examples as Examples
from .examples import ImageData as ImageData
from .examples import Task as Task
from .load import load_data as load_data
