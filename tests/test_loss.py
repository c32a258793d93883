"""The loss in chunks: torch's cross-entropy, in less memory."""
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from onecard.loss import linear_cross_entropy, loss_of_chunk


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
@pytest.mark.parametrize("loss_function", [loss_of_chunk,
                                           torch.compile(loss_of_chunk, backend="eager")])
@pytest.mark.parametrize("B, T", [(1, 1), (3, 15), (5, 1001)])     # one chunk, two, three
def test_the_loss_and_its_gradients_are_the_plain_ones(B, T, loss_function):
    x, weight, targets = inputs(B, T, dtype=torch.float64)
    ours = linear_cross_entropy(x, weight, targets, loss_function)
    plain = plain_loss(x, weight, targets)
    for result, right in zip(with_gradients(ours, x, weight), with_gradients(plain, x, weight),
                             strict=True):
        assert torch.allclose(result, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype, rounding", [
    (torch.float32, 2**-18), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_the_error_is_the_rounding_of_the_dtype(dtype, rounding):
    x, weight, targets = inputs(8, 256, V=500)
    plain = with_gradients(plain_loss(x, weight, targets), x, weight)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = linear_cross_entropy(x, weight, targets, loss_of_chunk)
    errors = []
    for result, right in zip(with_gradients(loss, x, weight), plain, strict=True):
        assert result.dtype == torch.float32
        errors.append((result - right).norm() / right.norm() / rounding)
    assert errors[0] < 0.1 and max(errors) < 3      # of the loss: a mean over tokens, in fp32


def test_targets_of_minus_one_do_not_count():
    x, weight, targets = inputs(2, 16)
    counted = targets >= 0
    loss = linear_cross_entropy(x, weight, targets, loss_of_chunk)
    only = linear_cross_entropy(x[counted][None], weight, targets[counted][None], loss_of_chunk)
    assert torch.allclose(loss, only)
    loss.backward()
    assert (x.grad[~counted] == 0).all() and (x.grad[counted] != 0).any()


def test_without_gradients_the_loss_is_the_same():
    x, weight, targets = inputs(3, 15)
    loss = linear_cross_entropy(x, weight, targets, loss_of_chunk)
    with torch.no_grad():
        without = linear_cross_entropy(x, weight, targets, loss_of_chunk)
    assert torch.equal(without, loss.detach()) and not without.requires_grad


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("B, T, n_chunks", [(8, 32, 2), (5, 2000, 5)])
def test_all_logits_never_exist_at_once(B, T, n_chunks):
    x, weight, targets = inputs(B, T, V=200)
    with LargestTensor() as largest:
        linear_cross_entropy(x, weight, targets, loss_of_chunk).backward()
    assert largest.numel == B * T * 200 / n_chunks


def test_a_second_backward_is_an_error_and_not_a_wrong_gradient():
    loss = linear_cross_entropy(*inputs(2, 16), loss_of_chunk)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
