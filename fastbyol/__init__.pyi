# What `import fastbyol` gives, for type checkers: __init__.py imports it on first use.
from fastbyol.export import load_encoder as load_encoder

__all__ = ["__version__", "load_encoder"]

__version__: str
