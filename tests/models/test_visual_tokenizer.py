"""The visual tokenizer: released numbers, the codebook against loops and hand-worked cases, files."""

from __future__ import annotations

import argparse
import inspect
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from mhmoe_vl import config
from mhmoe_vl.errors import CheckpointError, ConfigError
from mhmoe_vl.models import visual_tokenizer
from mhmoe_vl.models.convert_vqkd import to_published
from mhmoe_vl.models.visual_tokenizer import Codebook, VisualTokenizer, load_visual_tokenizer

SIZES = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 2,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "num_codes": 8,
    "code_dim": 4,
    "target_dim": 12,
    "ema_decay": 0.9,
    "commitment_weight": 1.0,
    "revive_after": 3,
}


def tokenizer(**changes) -> VisualTokenizer:
    torch.manual_seed(0)
    return VisualTokenizer(**SIZES | changes)


def codebook(weight: list[list[float]], *, ema_decay: float = 0.5, revive_after: int = 0) -> Codebook:
    book = Codebook(len(weight), code_dim=len(weight[0]), ema_decay=ema_decay, revive_after=revive_after)
    book.weight.copy_(torch.tensor(weight))
    book.initialized.fill_(True)
    return book


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


# ----------------------------------------------------------------------------------- published weights
def test_outputs_equal_the_released_code(data_dir):
    model = load_visual_tokenizer(data_dir / "vqkd_small" / "model.safetensors", num_heads=4)
    case = load_file(data_dir / "vqkd_small" / "case.safetensors")
    output = model(case["image"])
    assert torch.equal(output.tokens, case["tokens"])
    assert torch.equal(model.tokenize(case["image"]), case["tokens"])
    torch.testing.assert_close(output.commitment_loss.mean()[None], case["commitment_loss"], rtol=0, atol=1e-6)
    torch.testing.assert_close(output.reconstruction, case["reconstruction"], rtol=0, atol=1e-5)


def test_published_names_are_written_back(data_dir, tmp_path):
    file = data_dir / "vqkd_small" / "model.safetensors"
    model, published = load_visual_tokenizer(file, num_heads=4), load_file(file)
    written = to_published(model.state_dict())
    counters = {"quantize.cluster_size", "quantize.embedding.embed_avg"}
    assert written.keys() == published.keys()
    for name, value in published.items():
        assert written[name].shape == value.shape and written[name].dtype == value.dtype, name
        assert name in counters or torch.equal(written[name], value), name
    save_file(written, tmp_path / "again.safetensors")
    again = load_visual_tokenizer(tmp_path / "again.safetensors", num_heads=4)
    assert same(again.state_dict(), model.state_dict())


def test_a_released_training_file_is_read_without_its_teacher(tmp_path):
    model = tokenizer(embed_dim=64, num_heads=1, decoder_num_heads=1).eval()
    others = {"teacher_model.conv1.weight": torch.zeros(3), "scaling_layer.scale": torch.ones(1)}
    weights = to_published(model.state_dict()) | others
    torch.save({"model": weights, "args": argparse.Namespace(lr=1), "epoch": 3}, tmp_path / "vqkd.pth")
    loaded = load_visual_tokenizer(tmp_path / "vqkd.pth")
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(loaded(images), model(images))


class Foreign:
    """Something that only unpickling would bring back."""


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read"),
        ({"model": Foreign()}, "cannot be read"),
        ({"epoch": 3}, "holds no tensors by name"),
        ([1, 2], "holds no tensors by name"),
        ({"encoder.pos_embed": torch.zeros(1, 5, 8)}, "'encoder.patch_embed.proj.weight' is missing"),
        ({"blocks.0.attn.qkv.weight": torch.zeros(3)}, "'blocks.0.attn.qkv.weight' is no part of a VQ-KD tokenizer"),
    ],
)
def test_files_that_are_no_tokenizer_are_refused_in_one_line(tmp_path, content, expected):
    path = tmp_path / "file.pth"
    if content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError) as error:
        load_visual_tokenizer(path)
    assert expected in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_wrong_shapes_and_cut_files_are_refused_in_one_line(tmp_path):
    weights = to_published(tokenizer().state_dict())
    save_file(weights | {"decoder.fc_norm.bias": torch.zeros(3)}, tmp_path / "shape.safetensors")
    save_file(weights | {"encoder.patch_embed.proj.weight": torch.zeros(3)}, tmp_path / "axes.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "shape.safetensors").read_bytes()[:-100])
    for name in ("shape", "axes", "cut"):
        with pytest.raises(CheckpointError) as error:
            load_visual_tokenizer(tmp_path / f"{name}.safetensors")
        assert f"{name}.safetensors" in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------ run folders
def run_folder(folder, model, checkpoint, part="model"):
    task = {"kind": "visual_tokenizer", "model": SIZES, "images": {"train": "a.tar"}}
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(
        config.dump(config.validate(config.RunConfig, {"task": task, "output_dir": str(folder)}))
    )
    (folder / "checkpoints" / checkpoint).mkdir(parents=True)
    weights = {f"tokenizer.{name}": value for name, value in model.state_dict().items()}
    save_file(weights, folder / "checkpoints" / checkpoint / f"{part}.safetensors")


def test_a_run_gives_its_best_weights_or_else_its_last(tmp_path):
    last, best = tokenizer(), VisualTokenizer(**SIZES)
    run_folder(tmp_path / "run", last, "last")
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(load_visual_tokenizer(tmp_path / "run").eval()(images).reconstruction, last.eval()(images)[1])
    run_folder(tmp_path / "run", best, "best")
    assert torch.equal(load_visual_tokenizer(tmp_path / "run")(images).reconstruction, best.eval()(images)[1])


def test_a_run_with_averaged_weights_gives_these(tmp_path):
    raw, averaged = tokenizer(), VisualTokenizer(**SIZES)
    run_folder(tmp_path / "run", raw, "best")
    weights = {f"tokenizer.{name}": value for name, value in averaged.state_dict().items()}
    save_file(weights, tmp_path / "run" / "checkpoints" / "best" / "ema.safetensors")
    assert torch.equal(load_visual_tokenizer(tmp_path / "run").codebook.weight, averaged.codebook.weight)


def test_other_folders_are_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    run_folder(tmp_path / "unsaved", tokenizer(), "step-00000001")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("task: {kind: masked_modeling, texts: {train: a.tar}}\n")
    cases = {"empty": "config.yaml", "unsaved": "last/model.safetensors", "other": "visual_tokenizer"}
    for name, expected in cases.items():
        with pytest.raises(CheckpointError) as error:
            load_visual_tokenizer(tmp_path / name)
        assert expected in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------- construction
def test_the_configuration_section_has_the_constructors_fields():
    parameters = [name for name in inspect.signature(VisualTokenizer).parameters]
    assert parameters == list(config.VisualTokenizerConfig.model_fields)


@pytest.mark.parametrize("changes", [{"img_size": 20}, {"num_heads": 3}, {"decoder_num_heads": 5}])
def test_sizes_that_do_not_fit_are_refused(changes):
    with pytest.raises(ConfigError, match="is not a multiple of"):
        tokenizer(**changes)


def test_shapes_and_decoding_of_looked_up_tokens():
    model, images = tokenizer(img_size=24).eval(), torch.rand(2, 3, 24, 24)
    output = model(images)
    assert output.tokens.shape == (2, 9) and output.tokens.dtype == torch.int64
    assert output.reconstruction.shape == (2, 9, 12) and output.commitment_loss.shape == (2, 9)
    assert model.num_codes == 8 and model.grid_size == 3
    codes = model.codebook.weight[output.tokens]
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(2, 9))
    torch.testing.assert_close(model.decode(codes), output.reconstruction)


def test_patches_are_numbered_row_by_row():
    model, image = tokenizer(img_size=32).eval(), torch.rand(1, 3, 32, 32)
    seen = []
    hook = model.encoder.patch_embed.register_forward_hook(lambda _, __, out: seen.append(out))
    model.tokenize(image)
    changed = image.clone()
    changed[..., 8:16, 16:24] = 0  # row 1, column 2 of a 4 x 4 grid
    model.tokenize(changed)
    hook.remove()
    assert (seen[0] - seen[1]).abs().amax(-1).nonzero().tolist() == [[0, 6]]


def test_the_whole_model_gets_gradients_and_codes_do_not():
    model = tokenizer().train()
    output = model(torch.rand(4, 3, 16, 16))
    (output.reconstruction.square().mean() + output.commitment_loss.mean()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.encoder.patch_embed.proj.weight.grad.abs().sum() > 0
    assert "codebook.weight" not in dict(model.named_parameters())


def test_an_empty_batch_passes_and_leaves_the_codes():
    model = tokenizer().train()
    before = model.codebook.weight.clone()
    output = model(torch.rand(0, 3, 16, 16))
    output.reconstruction.sum().backward()
    assert output.tokens.shape == (0, 4)
    torch.testing.assert_close(model.codebook.weight, before)


# ---------------------------------------------------------------------------------------------- codebook
@pytest.mark.parametrize("num_codes", [3, 16])
def test_tokens_are_the_nearest_codes(num_codes):
    torch.manual_seed(0)
    book = Codebook(num_codes, code_dim=5, ema_decay=0.9, revive_after=0).eval()
    z = torch.randn(4, 6, 5) * 3
    tokens, codes, distance = book(z)
    unit = z / z.norm(dim=-1, keepdim=True)
    expected = torch.cdist(unit.view(-1, 5), book.weight).argmin(-1).view(4, 6)
    assert torch.equal(tokens, expected) and torch.equal(book.assign(z), expected)
    torch.testing.assert_close(codes, book.weight[expected])
    torch.testing.assert_close(distance, ((unit - book.weight[expected]) ** 2).mean(-1))


def test_neighbours_are_decided_in_float32_under_autocast():
    torch.manual_seed(0)
    book = Codebook(64, code_dim=8, ema_decay=0.9, revive_after=0).eval()
    z = torch.randn(500, 8)
    expected = book(z)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(book(z), expected, rtol=0, atol=0)
        assert torch.equal(book.assign(z), expected[0])


def test_gradient_passes_straight_through_the_look_up():
    book = codebook([[1.0, 0.0], [0.0, 1.0]]).eval()
    z = torch.tensor([[3.0, 4.0]], requires_grad=True)
    tokens, codes, distance = book(z)
    assert tokens.tolist() == [1] and codes.tolist() == [[0.0, 1.0]]
    (codes * torch.tensor([[2.0, 7.0]])).sum().backward()
    # d/dz of z/|z| at (3, 4) is (I - uu') / 5 with u = (.6, .8): (2 - .6 * 6.8, 7 - .8 * 6.8) / 5.
    torch.testing.assert_close(z.grad, torch.tensor([[-0.416, 0.312]]))
    z.grad = None
    book(z)[2].sum().backward()
    # ((.6 - 0)^2 + (.8 - 1)^2) / 2 = .2; its gradient by u is (.6, -.2), which z/|z| turns into (.48, -.36) / 5.
    torch.testing.assert_close(distance, torch.tensor([0.2]))
    torch.testing.assert_close(z.grad, torch.tensor([[0.096, -0.072]]))


def test_codes_follow_the_mean_direction_of_their_rows():
    book = codebook([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], ema_decay=0.75).train()
    book(torch.tensor([[5.0, 0.0], [0.8, 0.6], [0.0, 9.0]]))
    # Code 0: rows (1, 0) and (.8, .6) sum to (1.8, .6), of unit length (3, 1)/sqrt(10).
    moved = torch.tensor([0.75 + 0.25 * 3 / math.sqrt(10), 0.25 / math.sqrt(10)])
    torch.testing.assert_close(book.weight[0], moved / moved.norm())
    torch.testing.assert_close(book.weight[1:], torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    assert book.unused_steps.tolist() == [0, 0, 1]


def test_codes_do_not_move_in_evaluation_or_by_assign():
    book = Codebook(4, code_dim=3, ema_decay=0.5, revive_after=1)
    before = {name: value.clone() for name, value in book.state_dict().items()}
    book.train().assign(torch.randn(10, 3))
    book.eval()(torch.randn(10, 3))
    assert same(book.state_dict(), before)


def clustered_rows(num: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    centers = torch.randn(12, 6, generator=generator)
    return centers[torch.arange(num) % 12] + 0.3 * torch.randn(num, 6, generator=generator)


def test_the_start_is_kmeans_by_cosine():
    z = clustered_rows(200)
    torch.manual_seed(1)
    book = Codebook(12, code_dim=6, ema_decay=1.0, revive_after=0).train()
    torch.manual_seed(2)
    book(z)
    rows = F.normalize(z, dim=-1)
    torch.manual_seed(2)
    codes = rows[torch.multinomial(torch.ones(200), 12)]
    for _ in range(10):
        nearest = [max(range(12), key=lambda k: float(row @ codes[k])) for row in rows]
        for k in range(12):
            members = [row for row, n in zip(rows, nearest, strict=True) if n == k]
            if members:
                codes[k] = F.normalize(sum(members), dim=0)
    torch.testing.assert_close(book.weight, codes)


def test_the_start_quantises_better_than_drawn_rows_and_happens_once(monkeypatch):
    z = clustered_rows(200)
    errors = {}
    for iterations in (0, 10):
        monkeypatch.setattr(visual_tokenizer, "KMEANS_ITERATIONS", iterations)
        torch.manual_seed(2)
        book = Codebook(12, code_dim=6, ema_decay=1.0, revive_after=0).train()
        assert not book.initialized
        errors[iterations] = book(z)[2].mean().item()
        started = book.weight.clone()
        book(torch.randn(50, 6))
        assert book.initialized
        torch.testing.assert_close(book.weight, started)
    assert errors[10] < 0.7 * errors[0]


def test_more_codes_than_rows_start_too():
    book = Codebook(16, code_dim=3, ema_decay=0.9, revive_after=0).train()
    book(torch.randn(5, 3))
    torch.testing.assert_close(book.weight.norm(dim=-1), torch.ones(16))


def test_a_code_is_revived_from_the_batch_after_so_many_steps_without_use():
    book = codebook([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], ema_decay=1.0, revive_after=3).train()
    rows = torch.tensor([[1.0, 0.0]] * 50 + [[0.6, 0.8]])  # only the last row is far from its code
    for step in range(2):
        book(rows)
        assert book.unused_steps.tolist() == [0, 0, step + 1, step + 1]
        assert book.weight[2:].tolist() == [[-1.0, 0.0], [0.0, -1.0]]
    book(rows)
    torch.testing.assert_close(book.weight[2:], rows[-1].expand(2, 2))
    torch.testing.assert_close(book.weight[:2], torch.eye(2))
    assert book.unused_steps.tolist() == [0, 0, 0, 0]


def test_no_revival_at_zero():
    book = codebook([[1.0, 0.0], [-1.0, 0.0]], revive_after=0).train()
    for _ in range(5):
        book(torch.tensor([[1.0, 0.1]]))
    assert book.weight[1].tolist() == [-1.0, 0.0]


def test_rows_that_are_not_finite_leave_no_trace():
    rows = torch.randn(20, 4)
    spoiled = torch.cat([rows, torch.tensor([[math.nan, 0, 0, 0], [math.inf, 0, 0, 0]])])
    books = []
    for z in (rows, spoiled):
        torch.manual_seed(0)
        books.append(Codebook(6, code_dim=4, ema_decay=0.9, revive_after=1).train())
        torch.manual_seed(1)
        for _ in range(3):
            books[-1](z)
    assert same(books[0].state_dict(), books[1].state_dict())


def test_training_resumes_bit_for_bit_from_saved_buffers(tmp_path):
    batches = [torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(8)]

    def steps(model, batches):
        for images in batches:
            output = model(images)
            model.zero_grad()
            (output.reconstruction.square().mean() + output.commitment_loss.mean()).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad

    model = tokenizer().train()
    steps(model, batches[:4])
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    random_state = torch.get_rng_state()
    steps(model, batches[4:])
    resumed = VisualTokenizer(**SIZES).train()
    resumed.load_state_dict(load_file(tmp_path / "model.safetensors"))
    torch.set_rng_state(random_state)
    steps(resumed, batches[4:])
    assert same(resumed.state_dict(), model.state_dict())


RANK_PROGRAM = """
import sys, torch, torch.distributed as dist
from safetensors.torch import save_file
from mhmoe_vl.models.visual_tokenizer import Codebook
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(0)
rows = torch.randn(5, 16, 4)
mine = rows[:, :10] if rank == 0 else rows[:, 10:]
fixed = Codebook(6, code_dim=4, ema_decay=0.8, revive_after=0).train()
fixed.initialized.fill_(True)
torch.manual_seed(rank)
started = Codebook(6, code_dim=4, ema_decay=0.8, revive_after=1).train()
for batch in mine:
    fixed(batch)
    started(batch)
found = {"fixed": fixed.weight, "started": started.weight, "unused": started.unused_steps}
save_file(found, f"{folder}/{rank}.safetensors")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_hold_the_same_codes_as_one_process_with_all_rows(tmp_path):
    command = [sys.executable, "-c", RANK_PROGRAM]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert same(first, second)
    torch.manual_seed(0)
    rows = torch.randn(5, 16, 4)
    alone = Codebook(6, code_dim=4, ema_decay=0.8, revive_after=0).train()
    alone.initialized.fill_(True)
    for batch in rows:
        alone(batch)
    torch.testing.assert_close(first["fixed"], alone.weight)
