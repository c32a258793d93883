import os
import time
from unittest import mock

import pytest
import torch

import runtime
from conftest import free_port

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def test_auto_takes_the_best_device_there_is():
    with mock.patch("torch.cuda.is_available", return_value=False), \
            mock.patch("torch.backends.mps.is_available", return_value=False):
        assert runtime.pick_device("auto") == CPU
    with mock.patch("torch.cuda.is_available", return_value=False), \
            mock.patch("torch.backends.mps.is_available", return_value=True):
        assert runtime.pick_device("auto").type == "mps"
    with mock.patch("torch.cuda.is_available", return_value=True):
        assert runtime.pick_device("auto").type == "cuda"
        assert runtime.pick_device("cuda:1") == torch.device("cuda", 1)


def test_a_device_that_is_not_there_is_named():
    with mock.patch("torch.cuda.is_available", return_value=False), \
            pytest.raises(ValueError, match="device = 'cuda': torch .* sees no such device here"):
        runtime.pick_device("cuda")
    with pytest.raises(ValueError, match="device = 'gpu' is not one that torch knows"):
        runtime.pick_device("gpu")


@pytest.mark.parametrize("capability, dtype", [
    ((12, 0), torch.bfloat16), ((8, 9), torch.bfloat16), ((8, 0), torch.bfloat16),
    ((7, 5), torch.float16), ((6, 1), torch.float32)])
def test_a_card_computes_in_what_its_generation_has(capability, dtype):
    with mock.patch("torch.cuda.get_device_capability", return_value=capability):
        assert runtime.pick_dtype("auto", CUDA) == dtype


@pytest.mark.parametrize("bf16, amx, dtype", [
    (True, False, torch.bfloat16), (False, True, torch.bfloat16), (False, False, torch.float32)])
def test_a_processor_computes_in_bf16_where_it_has_it(bf16, amx, dtype):
    with mock.patch("torch.cpu._is_avx512_bf16_supported", return_value=bf16, create=True), \
            mock.patch("torch.cpu._is_amx_tile_supported", return_value=amx, create=True):
        assert runtime.pick_dtype("auto", CPU) == dtype


def test_a_dtype_can_be_asked_for():
    assert runtime.pick_dtype("float16", CPU) == torch.float16
    with pytest.raises(ValueError, match="dtype = 'fp8'; use auto, float32, bfloat16, float16"):
        runtime.pick_dtype("fp8", CPU)


@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA GeForce RTX 4070", 58.3), ("NVIDIA GeForce RTX 4070 Ti SUPER", 88.2),
    ("NVIDIA GeForce RTX 3060", 25.5), ("NVIDIA GeForce RTX 5090", 209.5), ("Tesla T4", 65.0),
    ("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA GeForce RTX 4080 Laptop GPU", None),
    ("NVIDIA GeForce RTX 4090 D", None), ("AMD Radeon RX 7900", None)])
def test_the_peak_is_that_of_this_card_or_unknown(name, tflops):
    with mock.patch("torch.cuda.get_device_name", return_value=name):
        assert runtime.peak_flops(CUDA, torch.bfloat16) == (tflops and tflops * 1e12)
        assert runtime.peak_flops(CUDA, torch.float32) is None
    assert runtime.peak_flops(CPU, torch.bfloat16) is None


# (SMs, boost MHz) of the cards whose rate is computed
CHIPS = {"rtx 3060": (28, 1777), "rtx 3090": (82, 1695), "rtx 4060 ti": (34, 2535),
         "rtx 4070": (46, 2475), "rtx 4090": (128, 2520), "rtx 5050": (20, 2572),
         "rtx 5070": (48, 2512), "rtx 5090": (170, 2407)}


@pytest.mark.parametrize("name", CHIPS)
def test_the_cards_rates_are_512_flops_per_sm_and_clock(name):
    sms, mhz = CHIPS[name]
    assert runtime.CARDS[name][2] == pytest.approx(sms * mhz * 512 / 1e6, rel=0.01)


def test_torch_compile_works_here_or_says_what_is_missing(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with mock.patch("shutil.which", return_value=None):
        assert runtime.compile_obstacle(CPU).startswith(
            "there is no C++ compiler (no-such-compiler")
    monkeypatch.delenv("CXX")
    with mock.patch("shutil.which", return_value="/usr/bin/g++"), \
            mock.patch("sysconfig.get_path", return_value="/nowhere"):
        assert "sudo apt install python3-dev" in runtime.compile_obstacle(CPU)
    with mock.patch("torch.compile", side_effect=RuntimeError("not on this platform\nlong story")):
        assert runtime.compile_obstacle(CPU) == "RuntimeError: not on this platform"
    with mock.patch.dict("sys.modules", triton=None):
        assert runtime.compile_obstacle(CUDA).startswith("triton is not installed")


@pytest.mark.parametrize("release, given, wanted", [
    ("6.1.0-generic", {}, "expandable_segments:True"), ("5.15-microsoft-standard-WSL2", {}, None),
    ("6.1.0-generic", {"PYTORCH_CUDA_ALLOC_CONF": "x"}, None)])
def test_the_allocator_grows_its_segments_on_native_linux_only(monkeypatch, release, given, wanted):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(runtime.Path, "read_text", lambda self, **_: release)
    monkeypatch.setattr(runtime.Path, "is_file", lambda self: True)
    runtime._set_allocator()
    assert runtime.os.environ.get("PYTORCH_ALLOC_CONF") == wanted
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)


def test_random_state_goes_on_where_it_was():
    torch.manual_seed(3)
    state = runtime.rng_state(CPU)
    a = torch.rand(4)
    runtime.set_rng_state(state, CPU)
    assert torch.equal(torch.rand(4), a)


def test_one_process_is_a_world():
    world = runtime.World(CPU)
    assert world.is_main and world.any(True) and not world.any(False) and world.gather(5) == [5]
    assert world.sum(torch.ones(2)).tolist() == [1, 1]


def join(rank, folder, port):
    """Start as process `rank` of two, the second one late, and note when it had started."""
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank),
                      MASTER_ADDR="localhost", MASTER_PORT=port)
    new_group = torch.distributed.new_group

    def late_group(backend):
        group = new_group(backend=backend)
        time.sleep(rank)
        (folder / f"{rank} has its groups").write_text(str(time.time()))
        return group

    with mock.patch("torch.distributed.new_group", late_group):
        world = runtime.start("cpu")
    (folder / f"{rank} started").write_text(str(time.time()))
    world.wait()
    world.close()


def test_no_process_starts_before_all_have_joined(tmp_path):
    """One that stops with an error would take the store away from those that still need it."""
    torch.multiprocessing.spawn(join, (tmp_path, free_port()), nprocs=2)
    first, last = (float((tmp_path / name).read_text())
                   for name in ("0 started", "1 has its groups"))
    assert first >= last


def products_that_take(seconds, monkeypatch):
    """A clock on which the products of matrices take `seconds`, one after the other."""
    clock, at = [], 0.0
    for taken in seconds:
        clock += [at, at + taken]
        at += taken
    times = iter(clock)
    monkeypatch.setattr(runtime.time, "perf_counter", times.__next__)
    return times


def test_a_product_that_had_to_wait_does_not_decide_the_speed(monkeypatch):
    """Small ones on a core that is shared at first; of each size, all but the second of five."""
    seconds = {256: 0.014, 512: 0.002, 1024: 0.009, 2048: 0.075}    # at 238 and 229 GFLOP/s
    times = products_that_take([factor * fastest for fastest in seconds.values()
                                for factor in (10, 1, 3, 2, 5)], monkeypatch)
    found = runtime.measured_flops(torch.device("cpu"), torch.float32)
    assert found == pytest.approx(2 * 1024**3 / 0.009, rel=1e-6) and not list(times)


def test_slow_products_are_measured_in_a_second(monkeypatch):
    """fp16 at 1.4 GFLOP/s, where five of 1,024 would take 8 s: 256 five times and 512 twice."""
    times = products_that_take([0.025, 0.024, 0.024, 0.026, 0.03, 0.2, 0.19], monkeypatch)
    found = runtime.measured_flops(torch.device("cpu"), torch.float16)
    assert found == pytest.approx(2 * 512**3 / 0.19, rel=1e-6) and not list(times)
