"""Fine-tune PyTorch models under sparse masks, with Triton kernels that make the sparsity pay."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triton_sparsity.exports import *  # noqa: F403


def __getattr__(name: str) -> Any:
    # absolute: pytest imports this file once more under the checkout's folder name
    exports = import_module("triton_sparsity.exports")
    # from now on as if they had been imported here
    globals().update({key: vars(exports)[key] for key in exports.__all__ if key in vars(exports)})
    globals()["__all__"] = exports.__all__
    return globals()[name] if name in globals() else getattr(exports, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})


# torch takes seconds to import, which neither --help nor an error in an option has use for; where
# it is there nothing is gained by waiting, and programs that were exported find their operators
if "torch" in sys.modules:
    __getattr__("__all__")
