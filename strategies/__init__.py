"""How many updates become one step: classes to import, compose and subclass."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
