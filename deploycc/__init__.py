"""deploycc takes a trained model to the hardware it must run on.

Importing this package imports no framework.
"""

__version__ = "0.1.0"
