"""Does a run go on when memory runs out?"""
import pytest
import torch

from onecard.settings import UserError
from tiny_run import log, run_tiny, same, weights

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.30 GiB")
FULL_MPS = RuntimeError("MPS backend out of memory (MPS allocated: 18.03 GB)")
FULL_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
                        "allocate memory: you tried to allocate 9 bytes. Error code 12 (Cannot "
                        "allocate memory)")


def no_room_for(monkeypatch, limit, error=FULL):
    """Let torch run out of memory in every batch of more than `limit` windows, in its MLPs."""
    plain = torch.nn.functional.gelu

    def gelu(x, **options):
        if len(x) > limit and x.device.type != "meta":
            raise error
        return plain(x, **options)

    monkeypatch.setattr(torch.nn.functional, "gelu", gelu)


@pytest.mark.parametrize("error", [FULL, FULL_MPS, FULL_CPU], ids=["cuda", "mps", "cpu"])
def test_it_goes_on_with_smaller_micro_batches_and_the_same_losses(
        tiny, monkeypatch, capsys, error):
    run_tiny(out_dir="out-room", max_iters=6)
    no_room_for(monkeypatch, 1, error)
    run_tiny(out_dir="out-full", max_iters=6)
    out = capsys.readouterr().out
    for size in (2, 1):                 # of 4
        assert f"out of memory: going on with {size} windows at a time" in out
    room, full = log("out-room"), log("out-full")
    assert room.keys() == full.keys()
    assert all(full[k] == pytest.approx(room[k], abs=1e-4) for k in room)
    a, b = weights("out-room"), weights("out-full")
    assert all(torch.allclose(a[name], b[name], atol=1e-3) for name in a)


def test_a_step_that_fails_half_way_is_done_again_as_a_whole(tiny, monkeypatch):
    """Memory runs out in backward of the second micro-batch, when gradients are there already."""
    run_tiny(out_dir="out-room", max_iters=3, eval_interval=100)
    calls = []
    plain = torch.Tensor.backward

    def backward(self, *args, **options):
        plain(self, *args, **options)
        calls.append(1)
        if len(calls) == 4:
            raise FULL

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    run_tiny(out_dir="out-full", max_iters=3, eval_interval=100)
    room, full = log("out-room"), log("out-full")
    assert all(full[k] == pytest.approx(room[k], abs=1e-4) for k in room)


def test_one_window_that_does_not_fit_is_one_sentence_and_loses_nothing(tiny, monkeypatch):
    run_tiny(max_iters=2)
    before = weights()
    no_room_for(monkeypatch, 0)
    with pytest.raises(UserError, match="out of memory with 1 windows at a time, cpu. A smaller "
                                        "block_size, n_layer or n_embd fits"):
        run_tiny(init_from="resume", max_iters=4, eval_interval=50)
    assert same(weights(), before)


def test_an_optimizer_without_room_is_one_sentence_and_loses_nothing(tiny, monkeypatch):
    run_tiny(max_iters=2)
    before = weights()

    def step(self, closure=None):
        raise FULL

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(UserError, match="out of memory in the optimizer.*ckpt.pt is unchanged"):
        run_tiny(init_from="resume", max_iters=4, eval_interval=50)
    assert same(weights(), before)


def test_an_error_that_is_not_about_memory_keeps_its_traceback(tiny, monkeypatch):
    no_room_for(monkeypatch, 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_tiny()


def test_what_does_not_fit_is_refused_unless_forced_and_a_dry_run_warns(tiny, capsys):
    huge = dict(batch_size=1, block_size=16, n_embd=32 * 1024, n_head=32, n_layer=10, max_iters=1)
    with pytest.raises(UserError, match="needs .* GiB of memory.*--force starts it all the same"):
        run_tiny(**huge)
    run_tiny(**huge, dry_run=True)
    assert "warning    batch_size = 1 needs" in capsys.readouterr().out
