"""Which machine is it? The table of graphics cards, and what a run may use of one."""
import difflib
from dataclasses import dataclass

import torch

from onecard import runtime
from onecard.settings import UserError

VISIBLE = 0.976                         # of a card's memory (RTX 4070: 11,994 of 12,282 MiB)
CONTEXT_BYTES = 0.5 * 2**30             # CUDA's own, before the first tensor (H100: 0.51)
KERNEL_BYTES = 0.3 * 2**30              # of the kernels that a run loads (H100: 0.24)

# Shares of the peak that compiled GPT-2s and nanochats reached, by public logs of such cards: from
# 43 % (RTX 3090, masked attention) to 77 % (RTX 4070, 768 wide). Small micro-batches reach less.
USUAL = (0.43, 0.77)


@dataclass(frozen=True)
class Card:
    memory_mib: int                     # as nvidia-smi shows it
    bandwidth: int                      # GB/s of its memory
    tflops: float                       # dense products in bf16 or fp16, summed in fp32
    seen: tuple = USUAL                 # lowest and highest share of it in the logs of such cards


# Names are torch's in lower case, without "NVIDIA", "GeForce" and "Tesla". GeForce: SMs x 512 FLOP
# x rated boost clock (NVIDIA's papers on Ampere GA102, Ada and Blackwell; their figures for fp16
# sums are twice as high). Others: NVIDIA's data sheets.
CARDS = {
    "rtx 3060":         Card(12288,  360,  25.5),    # 28 SMs x 1777 MHz
    "rtx 3060 ti":      Card( 8192,  448,  32.4),    # 38 x 1665
    "rtx 3070":         Card( 8192,  448,  40.6),    # 46 x 1725
    "rtx 3070 ti":      Card( 8192,  608,  43.5),    # 48 x 1770
    "rtx 3080":         Card(10240,  760,  59.5),    # 68 x 1710; that of 12 GB has 61.3 TFLOP/s
    "rtx 3080 ti":      Card(12288,  912,  68.2),    # 80 x 1665
    "rtx 3090":         Card(24576,  936,  71.2),    # 82 x 1695
    "rtx 3090 ti":      Card(24564, 1008,  80.0),    # 84 x 1860
    "rtx 4060":         Card( 8188,  272,  30.2),    # 24 x 2460
    "rtx 4060 ti":      Card( 8188,  288,  44.1),    # 34 x 2535; also with 16 GB
    "rtx 4070":         Card(12282,  504,  58.3, (0.49, 0.77)),      # 46 x 2475; five logs
    "rtx 4070 super":   Card(12282,  504,  71.0),    # 56 x 2475
    "rtx 4070 ti":      Card(12282,  504,  80.2),    # 60 x 2610
    "rtx 4070 ti super": Card(16376,  672,  88.2),   # 66 x 2610
    "rtx 4080":         Card(16376,  717,  97.5),    # 76 x 2505
    "rtx 4080 super":   Card(16376,  736, 104.4),    # 80 x 2550
    "rtx 4090":         Card(24564, 1008, 165.2, (0.53, 0.63)),      # 128 x 2520; four logs
    "rtx 5050":         Card( 8151,  320,  26.3),    # 20 x 2572
    "rtx 5060":         Card( 8151,  448,  38.4),    # 30 x 2497
    "rtx 5060 ti":      Card(16311,  448,  47.4, (0.67, 0.74)),      # 36 x 2572; also with 8 GB
    "rtx 5070":         Card(12227,  672,  61.7),    # 48 x 2512
    "rtx 5070 ti":      Card(16303,  896,  87.9),    # 70 x 2452
    "rtx 5080":         Card(16303,  960, 112.6),    # 84 x 2617
    "rtx 5090":         Card(32607, 1792, 209.5),    # 170 x 2407
    "t4":               Card(15360,  320,  65.0),    # fp16 only
    "l4":               Card(23034,  300, 121.0),
    "a10":              Card(23028,  600, 125.0),
    "a100-sxm4-40gb":   Card(40960, 1555, 312.0),
    "a100-sxm4-80gb":   Card(81920, 2039, 312.0),
    "a100 80gb pcie":   Card(81920, 1935, 312.0),
    "h100 80gb hbm3":   Card(81559, 3350, 989.0, (0.28, 0.32)),      # ours, 12 x 6 x 768
    "h200":             Card(143771, 4800, 989.0),
}


def find(name):
    """The Card of a device's name, or None. Laptop and cut-down cards have names of their own."""
    name = without_maker(name)
    return CARDS.get(name) or CARDS.get(f"rtx {name}")


def without_maker(name):
    name = name.lower()
    for word in ("nvidia ", "geforce ", "tesla "):
        name = name.removeprefix(word)
    return name


@dataclass(frozen=True)
class Machine:
    """What each process of a run has."""
    name: str
    kind: str                           # cuda, mps or cpu
    dtype: torch.dtype                  # of matrix products
    room: float                         # bytes for the run, without CUDA's own; inf: unknown
    card: Card | None = None
    count: int = 1                      # processes, each with a device of its own

    @property
    def peak_flops(self):
        """Dense FLOP/s of one device, or None."""
        if self.card is None or self.dtype is torch.float32:
            return None
        return self.card.tflops * 1e12


def machine_of(device, dtype, count=1):
    """This Machine, with the memory that is free now."""
    name, room = runtime.device_name(device), runtime.free_bytes(device)
    if device.type == "cuda":
        room -= KERNEL_BYTES
    return Machine(name, device.type, dtype, room, find(name), count)


def machine_named(name, dtype, count=1):
    """The Machine with a card that a user names: 'RTX 4070'. On Linux, without a screen."""
    card = find(name)
    if not card:
        nearest = difflib.get_close_matches(without_maker(name), CARDS, n=3, cutoff=0.3) or CARDS
        raise UserError(f"device_name = {name!r} is not in the table of cards; nearest: "
                        f"{', '.join(nearest)}")
    room = VISIBLE * card.memory_mib * 2**20 - CONTEXT_BYTES - KERNEL_BYTES
    return Machine(name, "cuda", dtype, room, card, count)
