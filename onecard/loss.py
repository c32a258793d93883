"""How far is the model off? Cross-entropy in nats, without all logits at once.

The logits of a micro-batch are its largest tensor: 12 x 1,024 tokens x 50,304 ids are 1.2 GB in
bf16, and twice that in fp32. Here they exist for one chunk of tokens at a time. While they are
there, forward turns them into their part of both gradients; backward only scales these.
"""
import math

import torch

CHUNK = 2048                            # tokens whose logits exist at once, at most half of all


def linear_cross_entropy(x, weight, targets, loss_of_chunk):
    """Mean cross-entropy of x @ weight.T against `targets`, of which -1 do not count.

    x (B, T, C), weight (V, C), targets (B, T). `loss_of_chunk` is the function below, perhaps
    compiled. Products are in autocast's dtype; the loss and the sums over chunks are in fp32.
    """
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):         # forward casts x and weight itself, once
        return LinearCrossEntropy.apply(x.flatten(0, 1), weight, targets.flatten(), dtype,
                                        torch.is_grad_enabled(), loss_of_chunk)


class LinearCrossEntropy(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, needs_grad, loss_of_chunk):
        sum_dtype = torch.promote_types(dtype, torch.float32)
        x, w = x.to(dtype), weight.to(dtype)
        counts = targets >= 0
        n_counted = counts.sum()
        total = torch.zeros((), dtype=sum_dtype, device=x.device)
        grad_x, grad_w = [], None
        if needs_grad:
            grad_w = torch.zeros_like(weight, dtype=sum_dtype)
        n_chunks = max(math.ceil(len(x) / CHUNK), 2)
        chunks = zip(x.chunk(n_chunks), targets.clamp(min=0).chunk(n_chunks),
                     counts.chunk(n_chunks), strict=True)
        for x_c, targets_c, counts_c in chunks:
            total_c, grad_x_c = loss_of_chunk(x_c, w, targets_c, counts_c, grad_w)
            total += total_c
            grad_x.append(grad_x_c)
        if needs_grad:
            ctx.save_for_backward(torch.cat(grad_x), grad_w, n_counted)
        return total / n_counted

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_w, n_counted = ctx.saved_tensors
        scale = grad_loss / n_counted
        grad_x = grad_x.to(grad_w.dtype) * scale
        grad_w.mul_(scale)              # in place: a second backward is an error, not a copy
        return grad_x, grad_w, None, None, None, None


def loss_of_chunk(x, w, targets, counts, grad_w):
    """Summed cross-entropy of x @ w.T, and the gradient of x.

    x (N, C), w (V, C), targets (N,), counts (N,) bool. Adds the chunk's part of the weight's
    gradient to `grad_w` (V, C); without gradients it is None, and so is the second result.
    """
    targets, counts = targets[:, None], counts[:, None]
    logits = (x @ w.T).to(torch.promote_types(w.dtype, torch.float32))        # (N, V)
    target_logits = logits.gather(1, targets)
    compiled = torch.compiler.is_compiling()
    if compiled:
        logsumexp = logits.logsumexp(1, keepdim=True)
    else:                               # eager: exponentials take the memory of the logits
        largest = logits.amax(1, keepdim=True)
        exponentials = logits.sub_(largest).exp_()
        sums = exponentials.sum(1, keepdim=True)
        logsumexp = sums.log() + largest
    total = ((logsumexp - target_logits) * counts).sum()
    if grad_w is None:
        return total, None
    # the gradient of the logits: softmax, minus 1 at the target
    if compiled:                        # one pass over memory; scatter_add_ would make it three
        is_target = torch.arange(w.size(0), device=w.device) == targets
        grad = ((logits - logsumexp).exp() - is_target.to(logits.dtype)) * counts
    else:
        grad = exponentials.mul_(counts / sums)
        grad.scatter_add_(1, targets, -counts.to(grad.dtype))
    grad = grad.to(w.dtype)
    grad_w += grad.T @ x
    return total, grad @ w
