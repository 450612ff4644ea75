"""Which device a run gets, and what that device computes in."""

import os
import sys

import torch
from transformers.utils import (
    is_torch_bf16_available_on_device,
    is_torch_bf16_gpu_available,
    is_torch_xla_available,
    logging,
)

logger = logging.get_logger(__name__)


def best_device(use_cpu: bool = False) -> torch.device:
    """The accelerator if there is one, else the CPU, which `use_cpu` or accelerate's ACCELERATE_USE_CPU asks for."""
    if use_cpu or _accelerate_uses_cpu() or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _accelerate_uses_cpu() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "on")


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB so far: of a CUDA device what torch allocated there, else the resident memory of this
    process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    import resource  # Unix alone has it

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes, Linux KiB


def has_bfloat16(device: str | torch.device | None = None) -> bool:
    """Whether the device (by default the best one) has native bfloat16. A CPU that emulates it reads a prompt ten
    times slower than in float32."""
    kind = torch.device(device).type if device else best_device().type
    if kind == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return is_torch_bf16_available_on_device(kind)


def half_dtype(device: str | torch.device) -> str:
    """Name of the dtype for an LM that is stored in 16 bits: bfloat16 if the device has it. Without it, a CPU computes
    fastest in float32, an accelerator in float16."""
    if has_bfloat16(device):
        return "bfloat16"
    return "float32" if torch.device(device).type == "cpu" else "float16"


def exact_dtype(device: str | torch.device) -> torch.dtype:
    """The dtype for sums over a whole rollout: float64 if the device has it."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def random_state_of(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The states of the generators that are drawn from in a computation on this device: the CPU's and the device's."""
    get = getattr(getattr(torch, device.type, None), "get_rng_state", None)
    return torch.get_rng_state(), get(device) if get else None


def device_in_use() -> torch.device:
    """The accelerator if this process has begun to use it, else the CPU: nothing is set up on a device to find out."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return torch.device("cpu")
    begun = getattr(getattr(torch, accelerator.type, None), "is_initialized", lambda: True)
    return accelerator if begun() else torch.device("cpu")


def set_random_state(device: torch.device, state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    """Sets what [`random_state_of`] returned."""
    on_cpu, on_device = state
    torch.set_rng_state(on_cpu)
    if on_device is not None:
        getattr(torch, device.type).set_rng_state(on_device, device)


def warn_of_emulation(dtype: str | torch.dtype | None, device: str | torch.device) -> None:
    """Warns, once, if an LM of this dtype would run in bfloat16 that the device emulates."""
    if dtype in ("bfloat16", torch.bfloat16) and not has_bfloat16(device):
        logger.warning_once(
            f"This {torch.device(device).type} device emulates bfloat16, many times slower than {half_dtype(device)}: "
            "load the LM by `trl_proxy.loading.load_lm` with the dtype `auto`."
        )


def is_main_process() -> bool:
    """Whether this is the main process of a run. It works before torch.distributed is set up."""
    return int(os.environ.get("RANK") or 0) == 0


class DeviceDefaults:
    """A mixin to list before a TRL configuration. It chooses unset options for this machine.

    Without an accelerator `use_cpu` becomes true. `bf16` becomes true only if the device has bfloat16. TRL's own
    defaults ask for a GPU with bfloat16 and fail on any other machine.
    """

    use_cpu: bool
    bf16: bool | None
    fp16: bool
    activation_checkpointing: bool | None
    gradient_checkpointing: bool

    def __post_init__(self):
        if not is_torch_xla_available():  # accelerate finds those devices itself
            self._choose_device()
        if self.activation_checkpointing is None:  # TRL uses its old name, and transformers warns about that
            self.activation_checkpointing = self.gradient_checkpointing
        super().__post_init__()  # type: ignore[misc]  # the configuration after this mixin has it

    def _choose_device(self) -> None:
        on_cpu = self.use_cpu or _accelerate_uses_cpu()
        if not on_cpu and not torch.accelerator.is_available():
            on_cpu = self.use_cpu = True
            if is_main_process():
                dtype = "" if has_bfloat16("cpu") else "; `--dtype auto` means float32"
                logger.warning_once(f"No accelerator was found: this runs on the CPU{dtype}.")
        if self.bf16 is None:
            on_accelerator = not (on_cpu or self.fp16) and is_torch_bf16_gpu_available()
            self.bf16 = on_accelerator and has_bfloat16(best_device())
