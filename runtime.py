"""Where am I? Ranks, device, dtype, random state, sums over ranks, and the table of GPUs."""
import gc
import math
import os
import platform
import shutil
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """The processes of this run. One process is a world of size 1; every method works the same."""
    device: torch.device
    rank: int = 0
    size: int = 1
    control: object = None          # a gloo group for flags, so that asking never waits for the GPU

    @property
    def is_main(self):
        return self.rank == 0

    def sum(self, tensor):
        """`tensor` summed over ranks, in place where there are several."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag):
        """True on all ranks if `flag` is true on one."""
        if self.size == 1:
            return bool(flag)
        told = torch.tensor([int(flag)])
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self.control)
        return bool(told.item())

    def gather(self, thing):
        """[thing of rank 0, thing of rank 1, ...] on every rank."""
        if self.size == 1:
            return [thing]
        things = [None] * self.size
        dist.all_gather_object(things, thing, group=self.control)
        return things

    def wait(self):
        if self.size > 1:
            dist.barrier(group=self.control)

    def close(self):
        if self.size > 1:
            dist.destroy_process_group()


def start(device="auto", backend="auto"):
    """Find the device, join the other ranks if torchrun started several, and return the World."""
    _set_allocator()
    # torch keeps compiled kernels in /tmp, which a reboot empties; here a resumed run finds them
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR",
                          str(Path(__file__).resolve().parent / ".cache" / "inductor"))
    device = pick_device(device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")                      # TF32 where it stays fp32
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return World(device)
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"torchrun started process {local_rank} here, but this machine has "
                             f"{torch.cuda.device_count()} GPUs; set --nproc_per_node to that")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and device.type != "cuda":
        raise ValueError(f"backend = 'nccl' needs CUDA, and the device is {device.type}; "
                         "use --backend=gloo")
    dist.init_process_group(backend)
    world = World(device, rank, size, control=dist.new_group(backend="gloo"))
    world.wait()        # or an error of rank 0 takes its store away from those that still join
    return world


def pick_device(name="auto"):
    """torch.device for 'auto' (cuda, else mps, else cpu) or for any name that torch knows."""
    has = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available,
           "cpu": lambda: True}
    if name == "auto":
        name = next(kind for kind, available in has.items() if available())
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device = {name!r} is not one that torch knows; "
                         "use auto, cuda, cuda:1, mps or cpu") from None
    if not has.get(device.type, lambda: True)():
        raise ValueError(f"device = {name!r}: torch {torch.__version__} sees no such device here. "
                         "--device=auto takes what there is; for an NVIDIA card "
                         "install torch's CUDA build (pytorch.org/get-started)")
    return device


def pick_dtype(name, device):
    """torch dtype for 'auto' or a name: bf16 where the hardware has it, else fp16 (GPU) or fp32."""
    if name != "auto":
        kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if name not in kinds:
            raise ValueError(f"dtype = {name!r}; use auto, {', '.join(kinds)}")
        return kinds[name]
    if device.type == "cuda":
        # torch.cuda.is_bf16_supported() also says yes to emulation, on cards from before 2020
        major = torch.cuda.get_device_capability(device)[0]
        return torch.bfloat16 if major >= 8 else torch.float16 if major == 7 else torch.float32
    if device.type == "cpu":
        native = [getattr(torch.cpu, f"_is_{unit}_supported", None)
                  for unit in ("avx512_bf16", "amx_tile")]
        return torch.bfloat16 if any(has() for has in native if has) else torch.float32
    return torch.float32


def rng_state(device):
    """What torch's generators need to go on from here: {"cpu": uint8, "device": uint8 or None}."""
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else \
        torch.mps.get_rng_state() if device.type == "mps" else None
    return {"cpu": torch.get_rng_state(), "device": on_device}


def set_rng_state(state, device):
    torch.set_rng_state(state["cpu"])
    if state["device"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["device"], device)
    if state["device"] is not None and device.type == "mps":
        torch.mps.set_rng_state(state["device"])


def device_name(device):
    """'NVIDIA GeForce RTX 4070', or the processor's name and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines()
                  if line.startswith("model name")]
        name = models[0] if models else name
    return f"{name} ({device.type}, {torch.get_num_threads()} threads)"


def memory(device):
    """(free, all) bytes of the device's memory; of the computer's where it shares that."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    if device.type == "mps":
        most = torch.mps.recommended_max_memory()
        return most - torch.mps.driver_allocated_memory(), most
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        kib = {line.split(":")[0]: int(line.split()[1])
               for line in meminfo.read_text().splitlines()}
        return kib["MemAvailable"] * 1024, kib["MemTotal"] * 1024
    if sys.platform == "win32":
        import ctypes
        status = (ctypes.c_uint64 * 8)(64)      # MEMORYSTATUSEX: its length, then bytes from [1] on
        ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return status[2], status[1]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total, total                         # macOS gives what is unused to whoever asks


def is_out_of_memory(error):
    """Whether an error says that memory is used up: CUDA's own type, or MPS's or a CPU's words."""
    words = "out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory"
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) \
        or any(phrase in str(error) for phrase in words)


def free_memory(device):
    """Give the memory of dropped tensors back."""
    gc.collect()
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()


def divisor(n, limit):
    """The largest divisor of `n` that is at most `limit`."""
    return next(d for d in range(min(n, int(limit)), 0, -1) if n % d == 0)


def smaller_when_full(do, B, world, what, say):
    """(do(B), B), again with half of B windows at a time whenever memory runs out."""
    while True:
        try:
            return do(B), B
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # out here, where no traceback holds the tensors of what failed
        free_memory(world.device)
        if B == 1 or world.size > 1:
            raise ValueError(
                f"out of memory in {what} with {B} windows at a time, {world.device}. " +
                ("A smaller block_size, n_layer or n_embd fits" if B == 1 else
                 f"Nearest that may fit: --init_from=resume --batch_size={B // 2} "
                 "with twice the gradient_accumulation_steps"))
        B = divisor(B, B // 2)
        say(f"out of memory in {what}: going on with {B} windows at a time, "
            "which changes no result")


def measured_flops(device, dtype, at_least_s=0.01):
    """FLOP/s of a product of square matrices: the best of several sizes, from 256 on.

    The last one is from 1,024 on the first that takes `at_least_s`, or 8,192. One size alone, next
    to other work, can take a hundred times as long. Where a smaller one takes ten times that, as in
    fp16 on a CPU without units for it, it is the last, and taken twice.
    """
    best = 0.0
    for size in (256, 512, 1024, 2048, 4096, 8192):
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        fastest = math.inf
        for again in range(5):
            began = time.perf_counter()
            (a @ b)[0, 0].item()            # which waits for the device
            fastest = min(fastest, time.perf_counter() - began)
            if again and fastest >= 10 * at_least_s:
                break
        best = max(best, 2 * size**3 / fastest)
        if fastest >= at_least_s * (1 if size >= 1024 else 10):
            break
    return best


def versions():
    """Of what decides the numbers of a run."""
    return {"python": platform.python_version(), "torch": str(torch.__version__),
            "numpy": np.__version__}


def _set_allocator():
    """Let CUDA's allocator grow its segments, which leaves more of a 12 GB card usable.

    Not on Windows (ignored) and not under WSL (can fail the first allocation, pytorch#192330).
    """
    release = Path("/proc/sys/kernel/osrelease")
    native_linux = sys.platform == "linux" and release.is_file() \
        and "microsoft" not in release.read_text().lower()
    if native_linux and "PYTORCH_ALLOC_CONF" not in os.environ \
            and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def compile_obstacle(device):
    """What keeps torch.compile from working here, as a phrase, or None. Tries a small function."""
    if device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "triton is not installed" + (
                " (pip install triton-windows)" if sys.platform == "win32" else "")
    compiler = os.environ.get("CXX") or ("cl" if sys.platform == "win32" else "g++")
    if not shutil.which(compiler) and not shutil.which("clang++"):
        return f"there is no C++ compiler ({compiler}; on Debian and Ubuntu: sudo apt install g++)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "the Python headers are missing (on Debian and Ubuntu: sudo apt install python3-dev)"
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:                              # any failure here means: go on without
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    return None


# name as torch gives it, lower case, without "nvidia geforce ": (memory in MiB as nvidia-smi shows
# it, GB/s, dense bf16 or fp16 TFLOP/s with fp32 accumulation).
# GeForce: SMs x 512 FLOP per clock x rated boost clock, half of the figure for fp16 accumulation
# (NVIDIA's Ampere GA102, Ada and Blackwell RTX architecture papers).
# Data-centre cards: datasheets, dense.
CARDS = {
    "rtx 3060":         (12288,  360,  25.5),   # 28 x 1777 MHz
    "rtx 3060 ti":      ( 8192,  448,  32.4),   # 38 x 1665
    "rtx 3070":         ( 8192,  448,  40.6),   # 46 x 1725
    "rtx 3070 ti":      ( 8192,  608,  43.5),   # 48 x 1770
    "rtx 3080":         (10240,  760,  59.5),   # 68 x 1710; the 12 GB one of the same name has 61.3
    "rtx 3080 ti":      (12288,  912,  68.2),   # 80 x 1665
    "rtx 3090":         (24576,  936,  71.2),   # 82 x 1695
    "rtx 3090 ti":      (24564, 1008,  80.0),   # 84 x 1860
    "rtx 4060":         ( 8188,  272,  30.2),   # 24 x 2460
    "rtx 4060 ti":      ( 8188,  288,  44.1),   # 34 x 2535; also with 16 GB
    "rtx 4070":         (12282,  504,  58.3),   # 46 x 2475
    "rtx 4070 super":   (12282,  504,  71.0),   # 56 x 2475
    "rtx 4070 ti":      (12282,  504,  80.2),   # 60 x 2610
    "rtx 4070 ti super":(16376,  672,  88.2),   # 66 x 2610
    "rtx 4080":         (16376,  717,  97.5),   # 76 x 2505
    "rtx 4080 super":   (16376,  736, 104.4),   # 80 x 2550
    "rtx 4090":         (24564, 1008, 165.2),   # 128 x 2520
    "rtx 5050":         ( 8151,  320,  26.3),   # 20 x 2572
    "rtx 5060":         ( 8151,  448,  38.4),   # 30 x 2497
    "rtx 5060 ti":      (16311,  448,  47.4),   # 36 x 2572; also with 8 GB
    "rtx 5070":         (12227,  672,  61.7),   # 48 x 2512
    "rtx 5070 ti":      (16303,  896,  87.9),   # 70 x 2452
    "rtx 5080":         (16303,  960, 112.6),   # 84 x 2617
    "rtx 5090":         (32607, 1792, 209.5),   # 170 x 2407
    "tesla t4":         (15360,  320,  65.0),   # fp16 only
    "nvidia l4":        (23034,  300, 121.0),
    "nvidia a10":       (23028,  600, 125.0),
    "nvidia a100-sxm4-40gb": (40960, 1555, 312.0),
    "nvidia a100-sxm4-80gb": (81920, 2039, 312.0),
    "nvidia a100 80gb pcie": (81920, 1935, 312.0),
    "nvidia h100 80gb hbm3": (81559, 3350, 989.0),
    "nvidia h200":      (143771, 4800, 989.0),
}


def card(name):
    """The row of CARDS for a device name, or None.

    Laptop and cut-down cards share names, not speed: None.
    """
    name = name.lower().removeprefix("nvidia ").removeprefix("geforce ")
    return next((CARDS[key] for key in (name, f"rtx {name}", f"nvidia {name}") if key in CARDS),
                None)


def peak_flops(device, dtype):
    """Dense FLOP/s of this card in `dtype` with fp32 accumulation, or None where it is unknown."""
    if device.type != "cuda" or dtype is torch.float32:
        return None
    row = card(torch.cuda.get_device_name(device))
    return row[2] * 1e12 if row else None
