"""Attention: torch's own, by other ways."""
import pytest
import torch
from torch.nn import functional as F

from onecard.attention import CausalAttentionOnCPU


def with_gradients(attention, inputs, grad):
    """[y, gradients of q, k, v] of attention(q, k, v)."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    y = attention(*inputs)
    y.backward(grad)
    return [y.detach(), *(x.grad for x in inputs)]


def plain(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("T", [1, 128, 129, 300])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_attention_for_cpus_is_attention(T, dtype, tolerance):
    torch.manual_seed(0)
    q, k, v, grad = torch.randn(4, 2, 3, T, 16)
    rights = with_gradients(plain, (q, k, v), grad)
    ours = with_gradients(CausalAttentionOnCPU.apply, [x.to(dtype) for x in (q, k, v)],
                          grad.to(dtype))
    for result, right in zip(ours, rights, strict=True):
        assert result.dtype == dtype
        assert (result - right).norm() < tolerance * grad.norm()
