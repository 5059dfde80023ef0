"""The mathematics and the messages of secure aggregation: pure, no network, no files, no clock."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
