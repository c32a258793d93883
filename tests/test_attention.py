"""Attention: torch's own, by other ways."""
import pytest
import torch
from torch.nn import functional as F

from onecard.attention import CausalAttentionOnCPU, rotary_angles, rotate


def with_gradients(attention, inputs, grad):
    """[y, gradients of q, k, v] of attention(q, k, v)."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    y = attention(*inputs)
    y.backward(grad)
    return [y.detach(), *(x.grad for x in inputs)]


def plain(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("T", [1, 5, 127, 128, 129, 300])
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


def test_rotary_positions_tell_distances_and_nothing_else():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16)                              # (B, T, H, D)
    cos_sin = rotary_angles(200, 16, theta=10000.0)

    def score(q_position, k_position):
        q_rotated = rotate(q, cos_sin[:, q_position:q_position + 1])
        return (q_rotated * rotate(k, cos_sin[:, k_position:k_position + 1])).sum().item()
    assert score(10, 3) == pytest.approx(score(110, 103), abs=1e-4)
    assert abs(score(10, 3) - score(103, 3)) > 0.1
