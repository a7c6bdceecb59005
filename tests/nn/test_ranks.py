"""Two processes, each with half of the batch, against one with all of it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mhmoe_vl.nn.ffn import build_ffn

CASES = {
    "mh_moe": dict(kind="mh_moe", hidden_dim=8, router={"kind": "cosine"}),
    "per modality": dict(kind="moe", hidden_dim=8, top_k=2, balance_per_modality=True, balance_share="all"),
    "bias": dict(kind="moe", hidden_dim=8, top_k=2, balance_bias_rate=0.01),
}


def build(name):
    torch.manual_seed(0)
    return build_ffn(8, **CASES[name]).double()


def batch():
    """Image tokens (all with rank 0) and text tokens with padding, split unevenly."""
    g = torch.Generator().manual_seed(1)
    image, text = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((4, 3, 8), (6, 5, 8)))
    return image, text, torch.arange(5) >= torch.tensor([[5], [2], [4], [1], [3], [0]])


def train(name, image, text, padding):
    """Losses and all gradients (and the bias), with a task loss that is a sum over all outputs."""
    layer = build(name)
    output = layer.forward_streams([image, text], [None, padding])
    balance, z = output.aux_losses["balance_loss"], output.aux_losses["z_loss"]
    (output.x[0].square().sum() + output.x[1][~padding].square().sum() + balance + z).backward()
    found = {key: p.grad for key, p in layer.named_parameters()}
    return {**found, "balance": balance.detach(), "z": z.detach(), **{k: b for k, b in layer.named_buffers()}}


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    image, text, padding = batch()
    for name in CASES:
        own = train(name, image[: 4 * (1 - rank)], text[rank::2][: 2 + rank], padding[rank::2][: 2 + rank])
        torch.save(own, f"{folder}/{name}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path):
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
    image, text, padding = batch()
    rows = [0, 2, 1, 3, 5]  # the texts that the ranks saw
    for name in CASES:
        ranks = [torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]
        layer = build(name)
        output = layer.forward_streams([image, text[rows]], [None, padding[rows]])
        task = output.x[0].square().sum() + output.x[1][~padding[rows]].square().sum()
        # Gradients averaged over ranks: the task's sum is halved, the losses over all ranks count once.
        (task / 2 + sum(output.aux_losses.values())).backward()
        for key, parameter in layer.named_parameters():
            mean = (ranks[0][key] + ranks[1][key]) / 2
            assert torch.allclose(mean, parameter.grad, rtol=1e-6, atol=1e-9), (name, key)
        for rank in ranks:
            assert torch.allclose(rank["balance"], output.aux_losses["balance_loss"], rtol=1e-6)
            assert torch.allclose(rank["z"], output.aux_losses["z_loss"], rtol=1e-6)
            for key, buffer in layer.named_buffers():
                assert buffer.any() and torch.allclose(rank[key], buffer)
