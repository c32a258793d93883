"""Where does this process run? Ranks, device, dtype, memory, random state, and Ctrl-C."""
import contextlib
import gc
import math
import os
import platform
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from onecard.settings import UserError

PROJECT = Path(__file__).resolve().parent.parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class World:
    """The processes of a run. One process is a world of size 1; every method works the same."""
    device: torch.device
    dtype: torch.dtype = torch.float32      # of matrix products; weights are in fp32
    rank: int = 0
    size: int = 1
    control: object = None          # a gloo group for flags: asking never waits for the GPU

    @property
    def is_main(self):
        return self.rank == 0

    def autocast(self):
        """Inside of this context, matrix products are computed in `dtype`."""
        enabled = self.dtype is not torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)

    def print(self, text):
        """Print on the first rank, above a progress bar."""
        if self.is_main:
            tqdm.write(text, file=sys.stdout)

    def sum(self, tensor):
        """The sum of `tensor` over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor):
        """The mean of `tensor` over all ranks."""
        return self.sum(tensor / self.size)

    def any(self, flag):
        """True on every rank if `flag` is true on one of them."""
        return any(self.gather(bool(flag)))

    def gather(self, thing):
        """[thing of rank 0, thing of rank 1, ...] on every rank."""
        if self.size == 1:
            return [thing]
        things = [None] * self.size
        dist.all_gather_object(things, thing, group=self.control)
        return things

    def wait(self):
        """Wait until every rank is here."""
        self.gather(None)

    def close(self):
        if self.size > 1:
            dist.destroy_process_group()


def start(device="auto", dtype="auto", backend="auto"):
    """Find the device, join the other ranks if torchrun started several; return the World."""
    grow_cuda_segments()
    # torch keeps compiled kernels in /tmp, which a reboot empties; here a resumed run finds them.
    # A compiler's command line cannot have every path in it: no space, no quote
    if re.fullmatch(r"[\w./:\\+-]+", str(PROJECT)) and os.access(PROJECT, os.W_OK):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(PROJECT / ".cache" / "inductor"))
    device = pick_device(device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")      # TF32 for what stays in fp32
        forbid_spilling(device)
    size = int(os.environ.get("WORLD_SIZE", 1))         # torchrun sets this, RANK and LOCAL_RANK
    if size == 1:
        return World(device, pick_dtype(dtype, device))
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"torchrun started process {local_rank} here, but this machine has "
                            f"{torch.cuda.device_count()} GPUs; set --nproc_per_node to that")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and device.type != "cuda":
        raise UserError(f"backend = 'nccl' needs CUDA, and the device is {device.type}; "
                        "use --backend=gloo")
    try:
        dist.init_process_group(backend)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the {size} processes do not find each other ({error}); start them by "
                        "torchrun") from None
    world = World(device, pick_dtype(dtype, device), rank, size, dist.new_group(backend="gloo"))
    # without this, an early error of rank 0 hides behind a connection error of the others
    world.wait()
    return world


def distribute(model, world):
    """A view of `model` whose backward averages the gradients of all ranks."""
    if world.size == 1:
        return model
    # one graph for all blocks: torch would cut it, to send gradients during a backward pass
    torch._dynamo.config.optimize_ddp = False
    return DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)


def is_native_linux():
    """Whether this is Linux, but not inside of Windows (WSL)."""
    release = Path("/proc/sys/kernel/osrelease")
    return release.is_file() and "microsoft" not in release.read_text().lower()


def grow_cuda_segments():
    """Let CUDA's allocator grow its segments: more of a 12 GB card is usable.

    Only on native Linux: Windows ignores it, and under WSL it can fail (pytorch#192330).
    """
    is_set = "PYTORCH_ALLOC_CONF" in os.environ or "PYTORCH_CUDA_ALLOC_CONF" in os.environ
    if is_native_linux() and not is_set:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def forbid_spilling(device):
    """Let CUDA raise an error where the card is full, also on Windows and WSL.

    Their driver would use the computer's memory, and the run would be 4 to 20 times slower.
    """
    if not is_native_linux():
        free, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction(free / total, device.index)


def pick_device(name="auto"):
    """The torch.device of 'auto' (cuda, else mps, else cpu), or of a name that torch knows."""
    is_here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
               "cpu": True}
    if name == "auto":
        name = next(kind for kind in is_here if is_here[kind])
    if not re.fullmatch(r"(cpu|mps)(:0)?|cuda(:\d+)?", name):
        raise UserError(f"device = {name!r}: use auto, cuda, cuda:1, mps or cpu")
    device = torch.device(name)
    if device.index:
        is_here["cuda"] = device.index < torch.cuda.device_count()
    if not is_here[device.type]:
        raise UserError(f"device = {name!r}: torch {torch.__version__} sees no such device here. "
                        "--device=auto takes what there is; for an NVIDIA card "
                        "install torch's CUDA build (pytorch.org/get-started)")
    if device.index is not None:
        torch.cuda.set_device(device)       # a graph and a count of memory are of the current one
    return device


def pick_dtype(name, device):
    """The dtype of a name. 'auto': bf16 where the hardware has it, else fp16 (GPU) or fp32."""
    if name != "auto":
        if name not in DTYPES:
            raise UserError(f"dtype = {name!r}; use auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cuda":
        # torch.cuda.is_bf16_supported() also says yes to emulation, on cards from before 2020
        major = torch.cuda.get_device_capability(device)[0]
        if major >= 8:
            return torch.bfloat16
        return torch.float16 if major == 7 else torch.float32
    if device.type == "cpu":
        units = torch.cpu.get_capabilities()
        if units.get("avx512_bf16") or units.get("amx_tile"):
            return torch.bfloat16
    return torch.float32


def matmul_dtype(device_type, dtype=torch.float32):
    """The dtype of matrix products: autocast's, or `dtype` where autocast is off."""
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return dtype


def rng_state(device):
    """What torch's generators need to go on from here: {"cpu": uint8, "device": uint8 or None}."""
    state = {"cpu": torch.get_rng_state(), "device": None}
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state()
    return state


def set_rng_state(state, device):
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and state["device"] is not None:
        torch.get_device_module(device).set_rng_state(state["device"])


def device_name(device):
    """'NVIDIA GeForce RTX 4070', or the processor's name and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file() and (found := re.search(r"model name\s*: (.*)", cpuinfo.read_text())):
        name = found[1].strip()
    return f"{name} ({device.type}, {torch.get_num_threads()} threads)"


def free_bytes(device):
    """What is free of the device's memory, or of the computer's on a CPU; inf if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return math.inf
    return 1024 * int(re.search(r"MemAvailable: *(\d+)", meminfo.read_text())[1])


def is_out_of_memory(error):
    """Whether memory is used up: CUDA has a type for it, MPS and CPUs only words."""
    words = "out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory"
    kinds = torch.OutOfMemoryError, MemoryError
    return isinstance(error, kinds) or any(phrase in str(error) for phrase in words)


def free_memory(device):
    """Give the memory of dropped tensors back to the device."""
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


@dataclass
class Stop:
    """Whether the run shall stop. With a threading.Event, two signals together would hang it."""
    requested: bool = False


def stop_on_signals():
    """A Stop that is requested by Ctrl-C, by SIGTERM, and by SIGHUP, which a closed terminal sends.

    When Ctrl-C or SIGTERM comes again, it ends the process at once.
    """
    stop = Stop()
    hangup = getattr(signal, "SIGHUP", None)            # Windows has none
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hangup and signal.getsignal(hangup) != signal.SIG_IGN:       # nohup ignores it
        numbers.append(hangup)

    def on_signal(number, frame):
        stop.requested = True
        following = signal.SIG_DFL
        if number == hangup:                            # some terminals send two
            following = signal.SIG_IGN
        signal.signal(number, following)
        # not print: it may be interrupted in the middle of another print
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping: this step ends, then the run is saved (again: at once)\n")

    for number in numbers:
        signal.signal(number, on_signal)
    return stop


def versions():
    """The versions that decide the numbers of a run."""
    return {"python": platform.python_version(), "torch": str(torch.__version__),
            "numpy": np.__version__}


def can_compile(world):
    """Whether torch.compile works here, tried with a small function. If not, says why."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=world.device))
        return True
    except Exception as error:          # whatever it is, the run can go on without
        reason = str(error).strip().partition("\n")[0][:200]
        world.print(f"torch.compile cannot work here, going on without it (slower): {reason}\n"
                    "It needs a C++ compiler and the Python headers (Debian and Ubuntu: sudo apt "
                    "install g++ python3-dev), on Windows with CUDA also triton-windows")
        return False
