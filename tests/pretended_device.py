"""Pretended accelerators `pretended:0` and `pretended:1`, without hardware: tensors that say so, with their numbers on
the CPU. Operations that mix devices raise as on CUDA, and each operation that would wait for the device is counted by
the line that asks for it.

Importing this registers the backend for the whole process: torch then has an accelerator.
"""

import collections
import sys
from pathlib import Path

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "pretended"
ROOT = str(Path(__file__).parents[1])
aten = torch.ops.aten

# What waits because the size of its result is a number on the device.
SIZED_BY_DATA = (
    aten.nonzero,
    aten.masked_select,
    aten.bincount,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
)
READS = (aten._local_scalar_dense, aten.item, aten.equal, aten.is_nonzero)
INDEXES = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index)


class _Backend(backend_registration._DummyBackendModule):
    def device_count(self) -> int:
        return 2

    def is_autocast_enabled(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device=None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None) -> None:
        torch.set_rng_state(state)

    def empty_cache(self) -> None:
        pass

    def synchronize(self, device=None) -> None:
        pass


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())


class OnDevice(torch.Tensor):
    """A tensor on a pretended device; its numbers are `inner`, on the CPU."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device | None = None, requires_grad: bool = False):
        if device is None:  # accelerate makes parameters by the class of the old one
            return torch.nn.Parameter(inner, requires_grad=requires_grad)
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=device,
            requires_grad=False,
        )
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def __repr__(self, **kwargs) -> str:
        return f"{self.inner!r} on {self.device}"

    def __deepcopy__(self, memo) -> "OnDevice":
        return OnDevice(self.inner.clone(), self.device)

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> list:
        _count("tolist")
        return self.inner.tolist()

    def new_tensor(self, data, *, dtype=None, device=None, requires_grad=False) -> "OnDevice":
        return OnDevice(self.inner.new_tensor(data, dtype=dtype), self.device)

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert {self.device} device type tensor to numpy: use Tensor.cpu()")


def _numbers(x):
    return x.inner if isinstance(x, OnDevice) else x


def _place(device) -> torch.device:
    device = torch.device(device)
    return torch.device(NAME, 0) if device.type == NAME and device.index is None else device


class Pretending(TorchDispatchMode):
    """Context manager: inside, tensors can be on pretended devices.

    Attributes:
        waits: (what waits, the line that asks for it) -> how often; the line is the project's or transformers'.
    """

    current: "Pretending | None" = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to skip it, torch would import it

    def __init__(self):
        super().__init__()
        self.waits: collections.Counter[tuple[str, str]] = collections.Counter()

    def __enter__(self):
        self.made = torch.tensor, torch.as_tensor
        torch.tensor, torch.as_tensor = map(_on_device, self.made)
        Pretending.current = self
        return super().__enter__()

    def __exit__(self, *exception):
        Pretending.current = None
        torch.tensor, torch.as_tensor = self.made
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def waited(self, ours: bool) -> int:
        """How often this project's lines (or others') waited."""
        return sum(n for (_, line), n in self.waits.items() if line.startswith("trl_proxy") == ours)


def _on_device(make):
    """`torch.tensor` or `torch.as_tensor` that knows pretended devices."""

    def made(data, *args, device=None, **kwargs):
        out = make(data, *args, **kwargs)
        if device is not None and torch.device(device).type == NAME and not isinstance(out, OnDevice):
            return OnDevice(out, _place(device))
        return out

    return made


def _count(what: str) -> None:
    if Pretending.current is None:
        return
    frame, line = sys._getframe(1), "?"
    while frame is not None:
        name = frame.f_code.co_filename
        if "site-packages/transformers/" in name:
            line = f"transformers{name.rsplit('transformers', 1)[-1]}:{frame.f_lineno}"
            break
        if name.startswith(f"{ROOT}/") and "site-packages" not in name and name != __file__:
            line = f"{name.removeprefix(f'{ROOT}/')}:{frame.f_lineno}"
            break
        frame = frame.f_back
    Pretending.current.waits[what, line] += 1


def _refuse(what: str, *devices) -> None:
    raise RuntimeError(f"Expected all tensors to be on the same device, {what}: {', '.join(map(str, devices))}")


def _run(func, args, kwargs):
    """Runs an operation on the numbers; raises or counts as a device would."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    on_device = [x for x in tensors if isinstance(x, OnDevice)]
    target = _target(func.overloadpacket, args, kwargs, tensors, on_device)
    options = dict(kwargs)
    if options.get("device") is not None and target.type == NAME:
        options["device"] = torch.device("cpu")
    options = {name: False if name in ("pin_memory", "non_blocking") else x for name, x in options.items()}
    with torch._C._DisableTorchDispatch():
        out = func(*tree_map(_numbers, args), **tree_map(_numbers, options))
    lies_there = target is not None and target.type == NAME
    # In place, and `out`: the same object comes back.
    same = {id(_numbers(x)): x for x in tensors} if func._schema.is_mutable else {}

    def wrapped(x):
        if not isinstance(x, torch.Tensor):
            return x
        return same.get(id(x)) if id(x) in same else OnDevice(x, target) if lies_there else x

    return tree_map(wrapped, out)


def _target(packet, args, kwargs, tensors, on_device) -> torch.device | None:
    """The device of the result."""
    asked = kwargs.get("device")
    if asked is not None or packet is aten._to_copy:
        place = _place(asked) if asked is not None else on_device[0].device if on_device else torch.device("cpu")
        if packet is aten._to_copy and on_device and place.type == "cpu":
            _count("copy to the CPU")
        return place
    if not on_device:
        return None
    if packet is aten.copy_:
        if not isinstance(args[0], OnDevice):
            _count("copy to the CPU")
        return args[0].device
    if packet in INDEXES:
        for index in args[1]:
            if not isinstance(index, torch.Tensor):
                continue
            if index.device not in (args[0].device, torch.device("cpu")):
                _refuse("indices", args[0].device, index.device)
            if index.dtype in (torch.bool, torch.uint8):
                _count("boolean index")
        if len(args) > 2 and isinstance(args[2], torch.Tensor) and args[2].dim() and args[2].device != args[0].device:
            _refuse("values", args[0].device, args[2].device)
        return args[0].device
    for x in tensors:
        if x.device != on_device[0].device and (isinstance(x, OnDevice) or x.dim()):
            _refuse(str(packet), on_device[0].device, x.device)
    sized = packet in SIZED_BY_DATA or (packet is aten.repeat_interleave and len(args) == 1)
    if sized or packet in READS:
        _count(str(packet).split(".")[-1])
    return on_device[0].device


def move(module: torch.nn.Module, device: str) -> torch.nn.Module:
    """Copies of the parameters and buffers to a pretended device, in place."""
    place = _place(device)
    for part in module.modules():
        for name, x in part._parameters.items():
            if x is not None:
                data = OnDevice(_numbers(x.data).detach().clone(), place)
                part._parameters[name] = torch.nn.Parameter(data, requires_grad=x.requires_grad)
        for name, x in part._buffers.items():
            if x is not None:
                part._buffers[name] = OnDevice(_numbers(x).clone(), place)
    return module


def to_cpu(x):
    """The numbers of a nest of tensors."""
    return tree_map(_numbers, x)
