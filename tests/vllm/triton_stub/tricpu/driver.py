"""The driver, which says that a CPU is there."""

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

__all__ = ["CpuDriver"]


class CpuDriver(DriverBase):
    """Satisfies the abstract methods."""

    @staticmethod
    def is_active() -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> object:
        raise NotImplementedError("nothing is timed under the interpreter")
