"""Fused losses of Self-Regulation (Zhang et al., ICCV 2021): the whole objective in one pass over the exits.

`selfreg_fast.reference` holds the same functions in plain PyTorch, which is the specification.
"""

from . import exits, reference
from .backends import backends
from .exits import ExitHead, MultiExit, MultiExitOutput
from .functional import (
    SelfRegulationOutput,
    exit_loss_matrix,
    mea_loss,
    presence_distillation_loss,
    presence_loss,
    presence_vector,
    self_regulation_loss,
    sr_f_loss,
    sr_l_loss,
)
from .modules import SelfRegulationLoss

__version__ = "0.2.0"

__all__ = [
    "ExitHead",
    "MultiExit",
    "MultiExitOutput",
    "SelfRegulationLoss",
    "SelfRegulationOutput",
    "backends",
    "exit_loss_matrix",
    "exits",
    "mea_loss",
    "presence_distillation_loss",
    "presence_loss",
    "presence_vector",
    "reference",
    "self_regulation_loss",
    "sr_f_loss",
    "sr_l_loss",
]
