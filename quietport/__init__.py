"""Programs that live on the host. Standard library only, shipped as one zipapp."""

__version__ = "0.1.0"
