"""The layer on a GPU: equal to the loop in float64, repeatable, without waiting for the host. Skipped without one."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from mhmoe_vl import create_model
from mhmoe_vl.benchmarks.contenders import Run
from mhmoe_vl.benchmarks.sizes import Case, Size
from mhmoe_vl.nn.experts import Experts
from mhmoe_vl.nn.ffn import build_ffn
from mhmoe_vl.nn.fused_experts import split_width

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS", "ignore:Synchronization debug mode"),
]
GPU = torch.device("cuda", 0)
SMALL = Size(tokens=300, dim=192, num_experts=6, hidden_dim=96)
SIZES = {
    "base": SMALL,
    "many experts": replace(SMALL, num_experts=130),
    "odd widths": replace(SMALL, dim=40, hidden_dim=37),
    "wide rows": replace(SMALL, dim=256, num_subtokens=1, hidden_dim=1024),
    "gated": replace(SMALL, activation="swiglu", bias=False),
    "no bias": replace(SMALL, bias=False),
}


@pytest.fixture(autouse=True)
def _exact_float32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


LIMITS = {torch.float32: 3e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("contender", ["mh_moe", "moe", "skewed", "split", "cosine"])
def test_outputs_and_gradients_are_those_of_the_loop(name, contender, dtype):
    if contender == "cosine" and dtype != torch.float32:
        pytest.skip("gradients of a cosine magnify the rounding of its inputs")
    run = Run(Case(name, contender, SIZES[name]), dtype, GPU)
    assert run.error() <= LIMITS[dtype]
    (y, grads), (again, repeated) = run.forward_backward(), run.forward_backward()
    assert torch.equal(y, again) and all(torch.equal(grads[key], repeated[key]) for key in grads), "bit for bit"


@pytest.mark.parametrize(
    ("options", "dtype", "path"),
    [
        ((192, 6, 96, "gelu"), torch.bfloat16, "fused"),
        ((192, 6, 96, "relu"), torch.bfloat16, "grouped"),
        ((192, 6, 96, "gelu"), torch.float32, "grouped"),
        ((192, 6, 100, "gelu"), torch.bfloat16, "fused"),
        ((192, 6, 100, "relu"), torch.bfloat16, "split"),
        ((192, 1024, 16, "relu"), torch.bfloat16, "split"),
    ],
)
def test_the_path_taken(options, dtype, path):
    dim, count, hidden, activation = options
    if path == "fused" and torch.cuda.get_device_capability(GPU) < (9, 0):
        pytest.skip("fused kernels are for Hopper and later")
    layer = Experts(dim, count, hidden, activation=activation, bias=True).to(GPU)
    assert split_width(dim) is not None
    assert layer.path(torch.zeros(1, dim, dtype=dtype, device=GPU), 2) == path


@pytest.mark.parametrize("contender", ["mh_moe", "grouped", "cosine", "moe", "thick"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_host_never_waits(contender, dtype):
    if (contender, dtype) == ("grouped", torch.float32):
        pytest.skip("stock grouped products in float32 are a loop over experts on a GPU")
    if dtype == torch.float32 and contender != "thick":
        pytest.skip("in float32 experts run in a loop whose bounds the host reads")
    run = Run(Case(contender, contender, SMALL), dtype, GPU)
    run.forward_backward()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        run.forward_backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_padding_and_two_streams_as_on_the_cpu():
    torch.manual_seed(0)
    layer = build_ffn(48, kind="mh_moe", num_experts=5, hidden_dim=40, capacity_factor=0.8)
    twin = copy.deepcopy(layer).to(GPU)
    xs = [torch.randn(3, 7, 48), torch.randn(2, 5, 48)]
    paddings = [None, torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]], dtype=torch.bool)]
    output = layer.forward_streams(xs, paddings)
    other = twin.forward_streams([x.to(GPU) for x in xs], [None, paddings[1].to(GPU)])
    for mine, theirs in zip(output.x, other.x, strict=True):
        torch.testing.assert_close(theirs.cpu(), mine, rtol=1e-4, atol=1e-5)
    assert torch.equal(other.stats.load.cpu(), output.stats.load)
    empty = twin(torch.zeros(0, 4, 48, device=GPU)).x
    assert empty.shape == (0, 4, 48)


@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself and about float32
def test_compiled_equals_eager():
    torch.manual_seed(0)
    layer = build_ffn(192, kind="mh_moe", num_experts=6, hidden_dim=96).to(GPU)
    x = torch.randn(4, 50, 192, device=GPU, requires_grad=True)
    found = []
    for call in (layer, torch.compile(layer)):
        with torch.autocast(GPU.type, torch.bfloat16):
            y = call(x).x
        found.append([y, *torch.autograd.grad(y.float().square().mean(), [x, *layer.parameters()], allow_unused=True)])
    for mine, theirs in zip(*found, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert (mine - theirs).abs().max() <= 0.02 * mine.abs().max()


def test_an_encoder_learns():
    torch.manual_seed(0)
    encoder = create_model("mhmoe_tiny_patch16_224", img_size=64, vocab_size=50, depth=2)
    encoder.to(GPU).train()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3, fused=True)
    images, text = torch.randn(8, 3, 64, 64, device=GPU), torch.randint(50, (8, 6), device=GPU)
    goal, losses = torch.randn(192, device=GPU), []
    for _ in range(20):
        with torch.autocast(GPU.type, torch.bfloat16):
            output = encoder(images, text)
        loss = (output.image.float().mean((0, 1)) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
