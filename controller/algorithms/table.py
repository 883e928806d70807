"""The table of algorithms: creation, NNCF's dictionaries and the command line read it.

A new algorithm is a file with a configuration and a controller, and a row here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..config.algorithm import AlgorithmConfig
from .base import BaseSparsityAlgoController
from .const import ConstSparsityConfig, ConstSparsityController
from .magnitude import MagnitudeSparsityConfig, MagnitudeSparsityController
from .movement.config import MovementSparsityConfig
from .movement.controller import MovementSparsityController
from .rb import RBSparsityConfig, RBSparsityController
from .rigl import RigLConfig, RigLController
from .set import SETConfig, SETController
from .sr_ste import SRSTEConfig, SRSTEController


class Algorithm(NamedTuple):
    """One algorithm; its configuration's ``algorithm`` is its full name, NNCF's if it has one."""

    short: str  # its name on a command line
    config: type[AlgorithmConfig]
    controller: type[BaseSparsityAlgoController]

    @property
    def name(self) -> str:
        """Its name in configurations and states."""
        return self.controller.name


_ROWS = (
    Algorithm("magnitude", MagnitudeSparsityConfig, MagnitudeSparsityController),
    Algorithm("const", ConstSparsityConfig, ConstSparsityController),
    Algorithm("set", SETConfig, SETController),
    Algorithm("rigl", RigLConfig, RigLController),
    Algorithm("rb", RBSparsityConfig, RBSparsityController),
    Algorithm("movement", MovementSparsityConfig, MovementSparsityController),
    Algorithm("sr_ste", SRSTEConfig, SRSTEController),
)
ALGORITHMS: dict[str, Algorithm] = {row.name: row for row in _ROWS}


def algorithm_of(config: AlgorithmConfig) -> Algorithm:
    """Return the algorithm that a configuration is of."""
    named: Any = config
    return ALGORITHMS[named.algorithm]
