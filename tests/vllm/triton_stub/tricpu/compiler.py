"""The compiler, which is never asked to compile."""

from triton.backends.compiler import BaseBackend, GPUTarget

__all__ = ["CpuBackend"]


class CpuBackend(BaseBackend):
    """Satisfies the abstract methods."""

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "tricpu"

    def parse_options(self, options: dict) -> object:
        return options

    def add_stages(self, stages: dict, options: object, language: object) -> None:
        raise NotImplementedError("set TRITON_INTERPRET=1")

    def load_dialects(self, context: object) -> None:
        del context

    def get_module_map(self) -> dict:
        return {}
