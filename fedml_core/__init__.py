"""What both sides must agree on: the model as one vector, messages, transforms, privacy and secure sums."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
