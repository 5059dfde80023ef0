from .client import Client as Client
from .client import Trainer as Trainer
from .flower import secure_mod as secure_mod
from .memory import FileMemory as FileMemory
from .memory import InProcessMemory as InProcessMemory
from .memory import MemoryStore as MemoryStore
from .memory import SpillingMemory as SpillingMemory
from .torch_trainer import TorchTrainer as TorchTrainer
