"""The former name of ``compiling``."""

from .compiling import call_of_class, compile_function

__all__ = ["call_of_class", "compile_function"]
