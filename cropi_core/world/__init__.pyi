from .base_policy import base_checkpoint as base_checkpoint
from .base_policy import ladder_checkpoint as ladder_checkpoint
from .families import FAMILIES as FAMILIES
from .families import build as build
