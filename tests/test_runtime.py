import importlib.util
import os
import shutil
import signal
import sys
import time
from unittest import mock

import pytest
import torch

from conftest import free_port, restoring
from onecard import runtime
from onecard.settings import UserError

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.mark.parametrize("cuda, mps, kind", [
    (False, False, "cpu"), (False, True, "mps"), (True, False, "cuda"), (True, True, "cuda")])
def test_auto_takes_the_best_device_there_is(cuda, mps, kind):
    with mock.patch("torch.cuda.is_available", return_value=cuda), \
            mock.patch("torch.backends.mps.is_available", return_value=mps):
        assert runtime.pick_device("auto").type == kind


@pytest.mark.parametrize("name, words", [
    ("cuda:5", "device = 'cuda:5': torch .* sees no such device here"),
    ("mps", "device = 'mps': torch .* sees no such device here"),
    ("gpu", "device = 'gpu': use auto, cuda, cuda:1, mps or cpu")])
def test_a_device_that_is_missing_is_named(name, words):
    with mock.patch("torch.cuda.is_available", return_value=True), \
            mock.patch("torch.cuda.device_count", return_value=1), \
            mock.patch("torch.backends.mps.is_available", return_value=False), \
            pytest.raises(UserError, match=words):
        runtime.pick_device(name)


@pytest.mark.parametrize("capability, dtype", [
    ((12, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16),
    ((6, 1), torch.float32)])
def test_a_card_computes_in_what_its_generation_has(capability, dtype):
    with mock.patch("torch.cuda.get_device_capability", return_value=capability):
        assert runtime.pick_dtype("auto", CUDA) == dtype


@pytest.mark.parametrize("bf16, amx, dtype", [
    (True, False, torch.bfloat16), (False, True, torch.bfloat16), (False, False, torch.float32)])
def test_a_processor_computes_in_bf16_where_it_has_it(bf16, amx, dtype):
    units = {"avx512_bf16": bf16, "amx_tile": amx}
    with mock.patch("torch.cpu.get_capabilities", return_value=units):
        assert runtime.pick_dtype("auto", CPU) == dtype


def test_a_dtype_has_a_name():
    assert runtime.pick_dtype("float16", CPU) == torch.float16
    with pytest.raises(UserError, match="dtype = 'fp8'; use auto, float32, bfloat16, float16"):
        runtime.pick_dtype("fp8", CPU)


@pytest.mark.parametrize("release, given, result", [
    ("6.1.0-generic", {}, "expandable_segments:True"), ("5.15-microsoft-standard-WSL2", {}, None),
    ("6.1.0-generic", {"PYTORCH_CUDA_ALLOC_CONF": "x"}, None)])
def test_the_allocator_grows_its_segments_on_native_linux_only(monkeypatch, release, given, result):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runtime.Path, "read_text", lambda self, **_: release)
    monkeypatch.setattr(runtime.Path, "is_file", lambda self: True)
    runtime.grow_cuda_segments()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == result
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)


@pytest.mark.parametrize("release, limits", [
    ("6.1.0-generic", []), ("5.15-microsoft-standard-WSL2", [(0.75, None)])])
def test_on_windows_and_wsl_a_full_card_is_an_error_and_not_a_crawl(monkeypatch, release, limits):
    called = []
    monkeypatch.setattr(runtime.Path, "read_text", lambda self, **_: release)
    monkeypatch.setattr(runtime.Path, "is_file", lambda self: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9 * 2**30, 12 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction",
                        lambda *args: called.append(args))
    runtime.forbid_spilling(torch.device("cuda"))
    assert called == limits


@pytest.mark.parametrize("name, is_ours", [("plain-1.0", True), ("it's mine", False)])
def test_compiled_code_is_kept_in_the_project_where_its_path_suits_a_compiler(
        work, monkeypatch, name, is_ours):
    copy = work / name / "onecard" / "runtime.py"
    copy.parent.mkdir(parents=True)
    shutil.copy(runtime.__file__, copy)
    spec = importlib.util.spec_from_file_location("runtime_elsewhere", copy)
    elsewhere = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, elsewhere)
    spec.loader.exec_module(elsewhere)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    elsewhere.start("cpu")
    ours = str(work / name / ".cache/inductor") if is_ours else None
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == ours


def test_a_closed_terminal_stops_a_run_however_often_it_says_so_but_not_under_nohup():
    with restoring():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        stop = runtime.stop_on_signals()
        for _ in range(3):
            signal.raise_signal(signal.SIGHUP)
        assert stop.requested
        stop = runtime.stop_on_signals()                # SIGHUP is ignored now, as by nohup
        signal.raise_signal(signal.SIGHUP)
        assert not stop.requested


def stop_twice(n):
    """Get SIGHUP, and SIGTERM after n more lines, most of which are of the handler of SIGHUP."""
    countdown = iter(range(n, -1, -1))

    def trace(frame, event, argument):
        if next(countdown, None) == 0:
            signal.raise_signal(signal.SIGTERM)
        return trace

    stop = runtime.stop_on_signals()
    sys.settrace(trace)
    signal.raise_signal(signal.SIGHUP)
    sys.settrace(None)
    os._exit(0 if stop.requested else 1)


@pytest.mark.parametrize("n", range(12))
def test_a_signal_that_interrupts_the_handler_of_another_one_hangs_no_run(n):
    pid = os.fork()
    if pid == 0:
        stop_twice(n)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.005)
    if ended == (0, 0):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert ended == (pid, 0)


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
    world.close()


def test_no_process_starts_before_all_have_joined(tmp_path):
    """One that stops with an error would take the store away from those that still need it."""
    torch.multiprocessing.start_processes(join, (tmp_path, free_port()), nprocs=2,
                                          start_method="fork")
    first, last = (float((tmp_path / name).read_text())
                   for name in ("0 started", "1 has its groups"))
    assert first >= last
