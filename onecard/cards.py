"""The table of graphics cards, and what a run may use of one."""
import difflib
from dataclasses import dataclass

import numpy as np
import torch

from onecard import runtime
from onecard.settings import UserError

VISIBLE = 0.976                         # of a card's memory (RTX 4070: 11,994 of 12,282 MiB)
CONTEXT_BYTES = 0.5 * 2**30             # CUDA's own, before the first tensor (H100: 0.51)
KERNEL_BYTES = 0.3 * 2**30              # of the kernels that a run loads (H100: 0.24)
SCREEN_GIB = 1, 3                       # what a desktop and its browser take of a card

# shares of a card's peak FLOP/s (MFU) that training reaches, (lowest, highest)
SHARE_WITHOUT_LOGS = (0.25, 0.8)        # no log is of a card like it
OWN_MARGIN = (0.9, 1.1)                 # times the logs of this card, which are of other programs
LIKE_MARGIN = (0.6, 1.15)               # times the logs of similar cards


@dataclass(frozen=True)
class Card:
    memory_mib: int                     # as nvidia-smi shows it
    bandwidth: int                      # GB/s of its memory
    tflops: float                       # dense products in bf16 or fp16, summed in fp32
    logs: tuple = ()                    # (width, share of the peak) that public logs show

    @property
    def bytes_per_flop(self):
        return self.bandwidth / self.tflops / 1000

    def logged(self, n_embd):
        """The share of the peak for a model of this width, interpolated between the logs."""
        widths, shares = zip(*self.logs, strict=True)
        return float(np.interp(n_embd, widths, shares))


# Names are torch's in lower case, without "NVIDIA", "GeForce" and "Tesla". GeForce: SMs x 512 FLOP
# x rated boost clock (NVIDIA's papers on Ampere GA102, Ada and Blackwell; their figures for fp16
# sums are twice as high). Others: NVIDIA's data sheets. dev/cards.md has the logs.
CARDS = {
    "rtx 3060":         Card(12288,  360,  25.5),    # 28 SMs x 1777 MHz
    "rtx 3060 ti":      Card( 8192,  448,  32.4),    # 38 x 1665
    "rtx 3070":         Card( 8192,  448,  40.6),    # 46 x 1725
    "rtx 3070 ti":      Card( 8192,  608,  43.5),    # 48 x 1770
    "rtx 3080":         Card(10240,  760,  59.5),    # 68 x 1710; that of 12 GB has 61.3 TFLOP/s
    "rtx 3080 ti":      Card(12288,  912,  68.2),    # 80 x 1665
    "rtx 3090":         Card(24576,  936,  71.2),    # 82 x 1695
    "rtx 3090 ti":      Card(24564, 1008,  80.0, ((768, 0.69),)),    # 84 x 1860
    "rtx 4060":         Card( 8188,  272,  30.2),    # 24 x 2460
    "rtx 4060 ti":      Card( 8188,  288,  44.1),    # 34 x 2535; also with 16 GB
    "rtx 4070":         Card(12282,  504,  58.3, ((384, 0.63), (768, 0.755))),       # 46 x 2475
    "rtx 4070 super":   Card(12282,  504,  71.0),    # 56 x 2475
    "rtx 4070 ti":      Card(12282,  504,  80.2),    # 60 x 2610
    "rtx 4070 ti super": Card(16376,  672,  88.2),   # 66 x 2610
    "rtx 4080":         Card(16376,  717,  97.5),    # 76 x 2505
    "rtx 4080 super":   Card(16376,  736, 104.4),    # 80 x 2550
    "rtx 4090":         Card(24564, 1008, 165.2, ((768, 0.56),)),    # 128 x 2520
    "rtx 5050":         Card( 8151,  320,  26.3),    # 20 x 2572
    "rtx 5060":         Card( 8151,  448,  38.4),    # 30 x 2497
    "rtx 5060 ti":      Card(16311,  448,  47.4, ((512, 0.675), (768, 0.735))),   # 36 x 2572
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
    "h100 80gb hbm3":   Card(81559, 3350, 989.0),
    "h200":             Card(143771, 4800, 989.0),
}


def usual_share(card, n_embd, tokens):
    """(lowest, highest share of the peak, where they come from) of a compiled model.

    `n_embd` is the model's width, `tokens` are those of a micro-batch.
    """
    logged = [other for other in CARDS.values()
              if other.logs and 0.8 < other.bytes_per_flop / card.bytes_per_flop < 1.25]
    margin, source = LIKE_MARGIN, "by logs of cards with as many bytes a FLOP"
    if card.logs:
        widths = " and ".join(str(width) for width, _ in card.logs)
        logged, margin, source = [card], OWN_MARGIN, f"by logs of this card at {widths} wide"
    if logged:
        shares = [other.logged(n_embd) for other in logged]
        low, high = margin[0] * min(shares), margin[1] * max(shares)
        narrowest = min(other.logs[0][0] for other in logged)
        low *= min(n_embd / narrowest, 1)       # narrower models wait for memory and for launches
    else:
        (low, high), source = SHARE_WITHOUT_LOGS, "a wide guess: there are no logs of such cards"
    if tokens < 6000:                   # logs show 40 to 49 % of the peak; of larger ones, 74 %
        low *= 0.6
    return low, min(high, SHARE_WITHOUT_LOGS[1]), source


def find(name):
    """The Card of a device's name, or None. Laptop and cut-down cards have names of their own."""
    name = name.lower().removeprefix("nvidia ").removeprefix("geforce ").removeprefix("tesla ")
    return CARDS.get(name) or CARDS.get(f"rtx {name}")


@dataclass(frozen=True)
class Machine:
    """The device of each process of a run."""
    name: str
    kind: str                           # cuda, mps or cpu
    dtype: torch.dtype                  # of matrix products
    room: float                         # bytes for the run, without CUDA's own; inf: unknown
    card: Card | None = None
    count: int = 1                      # processes, each with a device of its own
    held_by_others: float = 0           # bytes that other programs hold

    @property
    def peak_flops(self):
        """Dense FLOP/s of all devices together, or None."""
        if self.card is None or self.dtype is torch.float32:
            return None
        return self.count * self.card.tflops * 1e12


def machine_of(world):
    """This Machine, with the memory that is free now."""
    device = world.device
    name, room, held = runtime.device_name(device), runtime.free_bytes(device), 0
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        held = max(total - room - CONTEXT_BYTES, 0)
        room -= KERNEL_BYTES
    return Machine(name, device.type, world.dtype, room, find(name), world.size, held)


def machine_named(name, dtype):
    """The Machine with a card that a user names, as 'RTX 4070'. Nothing else is on the card."""
    card = find(name)
    if not card:
        nearest = difflib.get_close_matches(name.lower(), CARDS, n=3, cutoff=0.3) or CARDS
        raise UserError(f"device_name = {name!r} is not in the table of cards; nearest: "
                        f"{', '.join(nearest)}")
    room = VISIBLE * card.memory_mib * 2**20 - CONTEXT_BYTES - KERNEL_BYTES
    return Machine(name, "cuda", dtype, room, card)
