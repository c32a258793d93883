"""Cross-entropy in nats, a chunk of tokens at a time, to save memory.

The logits of a micro-batch are its largest tensor: 12 x 1,024 tokens x 50,304 ids are 1.2 GB in
bf16. Here, only one chunk's logits exist at a time. Their gradient overwrites them at once, so
forward computes both gradients, and backward only scales these.
"""
import torch

from onecard.runtime import matmul_dtype

SMALLEST_CHUNK = 2048                   # tokens; the products of smaller ones are slower


def linear_cross_entropy(x, weight, targets, chunk, chunk_loss):
    """Mean cross-entropy of x @ weight.T against `targets`; a target of -1 is ignored.

    x (B, T, C), weight (V, C), targets (B, T); `chunk` tokens have logits at the same time.
    `chunk_loss` is loss_of_logits, perhaps compiled. Products are in autocast's dtype; the loss and
    the sums over chunks are in fp32.
    """
    device = x.device.type
    dtype = matmul_dtype(device, x.dtype)
    with torch.autocast(device, enabled=False):         # forward does its own casts
        return LinearCrossEntropy.apply(x.flatten(0, 1), weight, targets.flatten(), dtype,
                                        torch.is_grad_enabled(), chunk, chunk_loss)


class LinearCrossEntropy(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, needs_grad, chunk, chunk_loss):
        w, valid = weight.to(dtype), targets >= 0
        total, n_valid = 0.0, valid.sum()
        grad_x, grad_w = torch.empty_like(x, dtype=dtype), None
        for begin in range(0, len(x), chunk):
            end = begin + chunk
            x_c = x[begin:end].to(dtype)                                      # (N, C)
            logits = x_c @ w.T                                                # (N, V)
            total += chunk_loss(logits, targets[begin:end], valid[begin:end], needs_grad)
            if needs_grad:              # from here on, logits are their own gradient
                torch.mm(logits, w, out=grad_x[begin:end])
                product = product_in_fp32(logits.T, x_c)                      # (V, C)
                grad_w = product if grad_w is None else grad_w.add_(product)
                del product
            del logits                  # free it before the next chunk's logits exist
        if needs_grad:
            ctx.save_for_backward(grad_x, grad_w, n_valid)
            ctx.x_dtype = x.dtype
        return total / n_valid

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_w, n_valid = ctx.saved_tensors
        scale = grad_loss / n_valid
        grad_x = grad_x.to(ctx.x_dtype) * scale
        grad_w.mul_(scale)              # in place saves a copy; a second backward is an error
        return grad_x, grad_w, None, None, None, None, None


def loss_of_logits(logits, targets, valid, needs_grad):
    """Summed cross-entropy of `logits` (N, V). If `needs_grad`, their gradient overwrites them.

    targets (N,), valid (N,) bool. The gradient is softmax, minus 1 at the target. Compiled, all of
    it becomes one pass over memory; eager, it works in place to save memory.
    """
    targets, valid = targets[:, None], valid[:, None]
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    target_scores = scores.gather(1, targets.clamp(min=0))
    if torch.compiler.is_compiling():
        logsumexp = scores.logsumexp(1, keepdim=True)
        if needs_grad:                  # scatter_add_ would need three passes
            is_target = torch.arange(logits.size(1), device=logits.device) == targets
            logits.copy_(((scores - logsumexp).exp() - is_target.to(scores.dtype)) * valid)
    else:
        largest = scores.amax(1, keepdim=True)
        exponentials = scores.sub_(largest).exp_()
        sums = exponentials.sum(1, keepdim=True)
        logsumexp = sums.log() + largest
        if needs_grad:
            exponentials.mul_(valid / sums)
            exponentials.scatter_add_(1, targets.clamp(min=0), -valid.to(scores.dtype))
            logits.copy_(exponentials)
    return ((logsumexp - target_scores) * valid).sum()


def product_in_fp32(a, b):
    """a @ b in fp32 (fp64 stays fp64). In bf16, CPUs and MPS round to bf16 first."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    if a.dtype is torch.float16:        # its largest number is 65,504, and sums may be larger
        return a.float() @ b.float()
    return (a @ b).float()              # torch has out_dtype only for CUDA
