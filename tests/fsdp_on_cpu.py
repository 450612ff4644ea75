"""scripts/train_baseline.py by FSDP on CPU processes, for test_train_baseline.py: accelerate itself knows FSDP on GPUs
alone, so it is told that these processes are some."""

import runpy
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from trl_proxy.devices import DeviceDefaults

DeviceDefaults._choose_device = lambda self: None
PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "train_baseline.py"), run_name="__main__")
