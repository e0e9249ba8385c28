"""The kernel of attention: which ones run here (`choose_attention`), and one for short sequences.

`kernels.apply` gives an Attention one of the classes below; all compute the same function.

Shapes: B images, S tokens, D features (a rank's share), nh heads of hd features.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from configs import ViTConfig
from model import Attention

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU builds of torch come without it
    triton = None

# cuDNN's backward takes four passes at these sizes: delta = rowsum(dy * y), the kernel itself, dq
# from fp32 to bf16, and PyTorch's own that joins dq, dk, dv to dqkv; then the bias gradient is one
# more. The queries of up to 256 tokens fit one tile, so the kernel below does it in one: it walks
# along the keys, finishes dk and dv of each tile of them, and adds up dq.
SHORT = 256  # tokens

if triton is not None:
    @triton.jit
    def _short_backward(qkv, y, dy, lse, dqkv, dbias, scale, S: tl.constexpr, H: tl.constexpr,
                        D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):
        """One image's head: dqkv of [S, 3, H, D] and its sum over tokens, from y, dy [S, H, D].

            p = exp(q k^T scale - lse)          dv = p^T dy
            ds = p (dy v^T - rowsum(dy y))      dk = ds^T q scale      dq = ds k scale

        Rows of p sum to 1 and rows of ds to 0, so over all tokens dv sums to dy's sum and dk to 0:
        no output depends on k's bias.
        """
        LOG2E: tl.constexpr = 1.4426950408889634  # exp2 is the hardware's own
        image, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
        d, m = tl.arange(0, D), tl.arange(0, QUERIES)
        here = image * S * 3 * H * D + head * D
        queries = here + m[:, None] * (3 * H * D) + d[None, :]
        rows = image * S * H * D + head * D + m[:, None] * (H * D) + d[None, :]
        q = tl.load(qkv + queries, mask=m[:, None] < S, other=0.0)              # [QUERIES, D]
        dy_m = tl.load(dy + rows, mask=m[:, None] < S, other=0.0)
        y_m = tl.load(y + rows, mask=m[:, None] < S, other=0.0)
        delta = tl.sum(y_m.to(tl.float32) * dy_m.to(tl.float32), 1)             # [QUERIES]
        lse_m = LOG2E * tl.load(lse + (image * H + head) * S + m, mask=m < S, other=float("inf"))
        dq = tl.zeros([QUERIES, D], tl.float32)
        for first in range(0, S, KEYS):
            n = first + tl.arange(0, KEYS)
            keys = here + n[:, None] * (3 * H * D) + d[None, :]
            k = tl.load(qkv + keys + H * D, mask=n[:, None] < S, other=0.0)     # [KEYS, D]
            v = tl.load(qkv + keys + 2 * H * D, mask=n[:, None] < S, other=0.0)
            p = tl.exp2(tl.dot(q, tl.trans(k)) * (scale * LOG2E) - lse_m[:, None])
            p = tl.where(n[None, :] < S, p, 0.0)  # at the keys that are not there it may be inf
            ds = (p * (tl.dot(dy_m, tl.trans(v)) - delta[:, None])).to(q.dtype)  # [QUERIES, KEYS]
            dv = tl.trans(tl.dot(tl.trans(dy_m), p.to(q.dtype)))                # [KEYS, D]
            dk = tl.trans(tl.dot(tl.trans(q), ds)) * scale
            dq += tl.dot(ds, k)
            tl.store(dqkv + keys + H * D, dk.to(q.dtype), mask=n[:, None] < S)
            tl.store(dqkv + keys + 2 * H * D, dv.to(q.dtype), mask=n[:, None] < S)
        dq *= scale
        tl.store(dqkv + queries, dq.to(q.dtype), mask=m[:, None] < S)
        sums = dbias + image * 3 * H * D + head * D + d
        tl.store(sums, tl.sum(dq, 0))
        tl.store(sums + H * D, tl.zeros([D], tl.float32))
        tl.store(sums + 2 * H * D, tl.sum(dy_m.to(tl.float32), 0))


@torch.library.custom_op("vit::short_attention_backward", mutates_args=())
def short_attention_backward(qkv: torch.Tensor, y: torch.Tensor, dy: torch.Tensor,
                             lse: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(dqkv [B, S, 3D], its exact sums over tokens [B, 3D] in fp32, 0 for k) from y, dy [B, S, D]
    and the log-sum-exp of each query's scores [B, nh, S]. B and nh may be a rank's share."""
    B, S, width = qkv.shape
    heads = width // 3 // head_dim
    dqkv, sums = torch.empty_like(qkv), qkv.new_empty(B, width, dtype=torch.float32)
    _short_backward[(B * heads,)](qkv, y, dy.contiguous(), lse, dqkv, sums, head_dim ** -0.5, S=S,
                                  H=heads, D=head_dim, QUERIES=SHORT, KEYS=64, num_warps=8,
                                  num_stages=2)
    return dqkv, sums


@short_attention_backward.register_fake
def _(qkv, y, dy, lse, head_dim):
    return torch.empty_like(qkv), qkv.new_empty(qkv.shape[0], qkv.shape[2], dtype=torch.float32)


class ShortAttention(torch.autograd.Function):
    """Attention of up to 256 tokens: cuDNN's forward, the backward above in one pass.

        qkv [B, S, 3D], bias [3D] (which qkv already contains)  ->  y [B, S, D]

    The bias is an argument for its gradient's sake, as in BiasGradient. L/16 at 248 images on an
    H100 (torch 2.11): 0.68 ms a block, cuDNN's passes and the joining 1.09. A first version of 0.83
    ms took the step from 1,156 to 1,207 images/s.
    """

    @staticmethod
    def forward(ctx, qkv, bias, head_dim):
        q, k, v = (z.transpose(1, 2) for z in qkv.unflatten(-1, (3, -1, head_dim)).unbind(2))
        y, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
        y = y.transpose(1, 2).flatten(2)
        ctx.save_for_backward(qkv, y, lse)
        ctx.head_dim, ctx.dtype = head_dim, bias.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        dqkv, sums = short_attention_backward(ctx.saved_tensors[0], ctx.saved_tensors[1], dy,
                                              ctx.saved_tensors[2], ctx.head_dim)
        return dqkv, sums.sum(0).to(ctx.dtype), None


class SdpaAttention(Attention):
    """Attention by one of torch's own kernels, self.kernel of BACKENDS."""

    def attend(self, qkv):
        with sdpa_kernel(BACKENDS[self.kernel]):
            return super().attend(qkv)


class FlashAttention(Attention):
    """The package flash-attn (--attention flash-attn): [n, S, nh, hd] in and out."""

    def attend(self, qkv):
        from flash_attn import flash_attn_func
        q, k, v = qkv.unflatten(-1, (3, -1, self.head_dim)).unbind(2)          # [n, S, nh/t, hd]
        rate = self.dropout if self.training else 0.0
        return flash_attn_func(q, k, v, dropout_p=rate).flatten(2)             # [n, S, D/t]


class TritonAttention(Attention):
    def attend(self, qkv):
        return ShortAttention.apply(qkv, self.qkv.bias, self.head_dim)         # [n, S, D/t]


ATTENTION = {"triton": TritonAttention, "flash-attn": FlashAttention}
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def choose_attention(choice: str, config: ViTConfig, tp: int, device: torch.device,
                     dtype: torch.dtype) -> tuple[str, str]:
    """The attention kernel to use and why: (a key of BACKENDS, triton or flash-attn, reason).

    Each candidate is tried on this shape, forward and backward; `auto` takes the first that runs,
    in the order in which they were fastest at the models' shapes on an H100. Raises ValueError if
    the kernel that was asked for does not run, naming those that do.
    """
    def error_of(name: str) -> str | None:
        shape = (1, config.num_attention_heads // tp, config.seq_length, config.head_dim)
        q = torch.zeros(shape, device=device, dtype=dtype, requires_grad=True)
        try:
            if name == "flash-attn":
                from flash_attn import flash_attn_func
                flash_attn_func(*[q.transpose(1, 2)] * 3).sum().backward()
            elif name == "triton":
                if triton is None or (device.type, dtype) != ("cuda", torch.bfloat16):
                    return "it needs Triton, CUDA and bf16"
                if shape[2] > SHORT or shape[3] != 64 or config.attention_dropout:
                    return f"it takes up to {SHORT} tokens, head size 64 and no attention dropout"
                qkv = q.detach().repeat(1, 3, 1, 1).transpose(1, 2).flatten(2).requires_grad_()
                ShortAttention.apply(qkv, qkv[0, 0], shape[3]).sum().backward()
            else:
                with sdpa_kernel(BACKENDS[name]):
                    F.scaled_dot_product_attention(
                        q, q, q, dropout_p=config.attention_dropout).sum().backward()
        except ImportError as e:
            return f"the package is not installed or does not import ({e})"
        except Exception as e:  # each kernel fails in its own way
            return str(e).strip().splitlines()[-1]
        return None

    shape = f"{config.seq_length} tokens, head size {config.head_dim}, {str(dtype)[6:]}"
    order = ["triton", *BACKENDS] if device.type == "cuda" else ["flash", "math"]
    if choice == "auto":
        skipped = []
        for name in order:
            error = error_of(name)
            if error is None:
                why = f"first of {', '.join(order)} that runs here"
                return name, why + (f"; not {', '.join(skipped)}" if skipped else "")
            skipped.append(name)
        raise ValueError(f"no attention kernel runs on {shape}: {error}")
    error = error_of(choice)
    if error is not None:
        legal = [name for name in (*order, "flash-attn") if error_of(name) is None]
        raise ValueError(f"--attention {choice} does not run on {device.type} with {shape}: "
                         f"{error}. Legal here: auto, {', '.join(legal)}")
    return choice, f"--attention {choice}, {shape}"


