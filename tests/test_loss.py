"""The loss in chunks: torch's cross-entropy, in less memory."""
import weakref

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from onecard.loss import linear_cross_entropy, loss_of_logits


def inputs(B, T, V=50, C=16, dtype=torch.float32):
    """x (B, T, C), weight (V, C) and targets (B, T), of which every seventh does not count."""
    torch.manual_seed(1)
    x = torch.randn(B, T, C, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, C, dtype=dtype, requires_grad=True)
    targets = torch.randint(V, (B, T))
    targets.view(-1)[3::7] = -1
    return x, weight, targets


def plain_loss(x, weight, targets):
    return F.cross_entropy((x @ weight.T).flatten(0, 1), targets.flatten(), ignore_index=-1)


def with_gradients(loss, x, weight):
    grads = torch.autograd.grad(3 * loss, (x, weight))
    return loss.detach(), *grads


# "eager" compiles no C++, but torch takes the lines for compiled steps
@pytest.mark.parametrize("loss_function", [loss_of_logits,
                                           torch.compile(loss_of_logits, backend="eager")])
@pytest.mark.parametrize("B, T, chunk", [(3, 15, 100), (3, 14, 21), (5, 201, 200)])
def test_the_loss_and_its_gradients_are_the_plain_ones(B, T, chunk, loss_function):
    x, weight, targets = inputs(B, T, dtype=torch.float64)          # 1, 2 and 6 chunks
    ours = linear_cross_entropy(x, weight, targets, chunk, loss_function)
    plain = plain_loss(x, weight, targets)
    for result, right in zip(with_gradients(ours, x, weight), with_gradients(plain, x, weight),
                             strict=True):
        assert torch.allclose(result, right, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        without = linear_cross_entropy(x, weight, targets, chunk, loss_function)
    assert torch.equal(without, ours) and not without.requires_grad


@pytest.mark.parametrize("dtype, rounding", [
    (torch.float32, 2**-18), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_the_error_is_the_rounding_of_the_dtype(dtype, rounding):
    x, weight, targets = inputs(8, 256, V=500)
    plain = with_gradients(plain_loss(x, weight, targets), x, weight)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = linear_cross_entropy(x, weight, targets, 1024, loss_of_logits)
    errors = []
    for result, right in zip(with_gradients(loss, x, weight), plain, strict=True):
        assert result.dtype == torch.float32
        errors.append((result - right).norm() / right.norm() / rounding)
    assert errors[0] < 0.1 and max(errors) < 3      # of the loss: a mean over tokens, in fp32


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_only_the_logits_of_a_chunk_exist_at_once():
    x, weight, targets = inputs(5, 2000, V=200)
    with LargestTensor() as largest:
        linear_cross_entropy(x, weight, targets, 2048, loss_of_logits).backward()
    assert largest.numel == 2048 * 200


def test_the_logits_of_a_chunk_are_gone_before_those_of_the_next():
    chunks = []

    def watched(logits, *args):
        assert all(reference() is None for reference in chunks)
        chunks.append(weakref.ref(logits))
        return loss_of_logits(logits, *args)

    linear_cross_entropy(*inputs(2, 300), 200, watched)
    assert len(chunks) == 3


def test_a_large_activation_in_fp16_gives_a_finite_gradient():
    """65,504 is fp16's largest number; the gradient of a weight is a sum over all tokens."""
    weight = torch.zeros(8, 4, requires_grad=True)
    x, targets = torch.full((1, 4096, 4), 40.0), torch.zeros(1, 4096, dtype=torch.long)
    with torch.autocast("cpu", torch.float16):
        linear_cross_entropy(x, weight, targets, 4096, loss_of_logits).backward()
    right, = torch.autograd.grad(plain_loss(x, weight, targets), weight)
    assert torch.allclose(weight.grad, right, rtol=1e-3)
