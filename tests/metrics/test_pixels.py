from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from lightning_robust.errors import UserError
from lightning_robust.metrics import PixelIoU, intersection_over_union, load_mask, stride_pattern, top_pixels


@given(st.integers(1, 9), st.integers(1, 9), st.floats(1e-6, 1), st.integers(1, 4), st.integers(0, 999))
def test_top_pixels_are_exactly_so_many_and_the_largest(
    height: int, width: int, share: float, levels: int, seed: int
) -> None:
    # few levels: many ties
    values = torch.randint(levels, (3, height, width), generator=torch.Generator().manual_seed(seed)).float()
    chosen = top_pixels(values, share)
    assert chosen.flatten(1).sum(1).tolist() == [max(1, round(share * height * width))] * 3
    for flat, mask in zip(values.flatten(1), chosen.flatten(1), strict=True):
        order = sorted(range(height * width), key=lambda i: (-flat[i], i))
        assert mask.nonzero()[:, 0].tolist() == sorted(order[: int(mask.sum())])


def test_top_pixels_of_a_constant_map_are_the_first() -> None:
    assert top_pixels(torch.zeros(10, 10), 0.25).flatten().nonzero()[:, 0].tolist() == list(range(25))
    signed = torch.tensor([[-0.0, 0.0, -0.0, 0.0]])
    assert top_pixels(signed, 0.5).tolist() == [[True, True, False, False]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ties_are_broken_alike_on_the_gpu() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        values = torch.randint(-2, 3, (16, 224, 224)).to(dtype) * -0.0 + torch.randint(2, (16, 224, 224)).to(dtype)
        assert torch.equal(top_pixels(values, 0.25), top_pixels(values.cuda(), 0.25).cpu())


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan")])
def test_impossible_shares_are_refused(share: float) -> None:
    with pytest.raises(UserError, match="above 0 and at most 1"):
        top_pixels(torch.rand(4, 4), share)
    with pytest.raises(UserError, match="above 0 and at most 1"):
        PixelIoU(share)


def test_maps_without_order_are_refused() -> None:
    with pytest.raises(UserError, match="NaN"):
        top_pixels(torch.tensor([[1.0, float("nan")]]), 0.5)
    with pytest.raises(UserError, match="at least one pixel"):
        top_pixels(torch.rand(4), 0.5)


def test_iou_equals_sets() -> None:
    a, b = torch.rand(20, 5, 6) < 0.4, torch.rand(5, 6) < 0.4
    for value, mask in zip(intersection_over_union(a, b), a, strict=True):
        one, other = set(map(tuple, mask.nonzero().tolist())), set(map(tuple, b.nonzero().tolist()))
        assert float(value) == len(one & other) / len(one | other)
    empty = torch.zeros(5, 6, dtype=torch.bool)
    assert float(intersection_over_union(empty, empty)) == 0.0
    assert float(intersection_over_union(b, b)) == 1.0


def test_iou_refuses_what_are_no_masks() -> None:
    mask = torch.ones(4, 4, dtype=torch.bool)
    with pytest.raises(UserError, match="bool"):
        intersection_over_union(mask.float(), mask)
    with pytest.raises(UserError, match="bring them to one size"):
        intersection_over_union(mask, mask[:, :3])


# kernels and strides of papers.md A.3, odd sizes, gaps and overlaps
@pytest.mark.parametrize("size", [(8, 8), (9, 11), (7, 10), (32, 32)])
@pytest.mark.parametrize(
    ("kernel", "stride"), [(1, 2), (1, (2, 1)), (1, (1, 2)), ((1, 2), (2, 4)), ((2, 1), (4, 2)), (2, 4), (3, 2), (3, 5)]
)
@pytest.mark.parametrize("offset", [0, 1, (0, 2)])
def test_stride_pattern_is_what_a_convolution_reads(
    size: tuple[int, int],
    kernel: int | tuple[int, int],
    stride: int | tuple[int, int],
    offset: int | tuple[int, int],
) -> None:
    convolution = nn.Conv2d(1, 1, kernel, stride, bias=False)
    nn.init.ones_(convolution.weight)
    image = torch.zeros(1, 1, *size, requires_grad=True)
    row, column = (offset, offset) if isinstance(offset, int) else offset
    convolution(image[..., row:, column:]).sum().backward()
    assert image.grad is not None
    assert torch.equal(stride_pattern(*size, kernel, stride, offset), image.grad[0, 0] != 0)


def test_the_even_grid_is_a_quarter_and_padding_gives_the_odd_one() -> None:
    assert float(stride_pattern(32, 32).double().mean()) == 0.25
    image = torch.zeros(1, 1, 8, 8, requires_grad=True)
    nn.functional.conv2d(image, torch.ones(1, 1, 1, 1), stride=2, padding=1).sum().backward()
    assert image.grad is not None
    assert torch.equal(stride_pattern(8, 8, offset=1), image.grad[0, 0] != 0)


@pytest.mark.parametrize("wrong", [{"kernel": 0}, {"stride": 0}, {"offset": -1}, {"kernel": 9}, {"stride": (1, 2, 3)}])
def test_impossible_patterns_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"stride_pattern: "):
        stride_pattern(8, 8, **wrong)


MASK = np.array([[0, 1, 0], [1, 0, 0]], dtype=np.uint8)


@pytest.mark.parametrize(
    "array", [MASK, MASK.astype(bool), MASK * 0.5, -MASK.astype(np.int64)], ids=["uint8", "bool", "float", "negative"]
)
def test_mask_from_numpy_files(array: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "mask.npy", array)
    np.savez(tmp_path / "one.npz", anything=array)
    np.savez_compressed(tmp_path / "named.npz", mask=array, other=np.zeros(3))
    for name in ("mask.npy", "one.npz", "named.npz"):
        assert torch.equal(load_mask(tmp_path / name, (2, 3)), torch.from_numpy(MASK.astype(bool)))


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "P", "RGB", "RGBA", "LA"])
def test_mask_from_png(mode: str, tmp_path: Path) -> None:
    grey = Image.fromarray(MASK * 255)
    if mode == "P":
        # number 1 of the palette is black and number 0 white: the colour counts
        image = grey.convert("P")
        image.putdata((1 - MASK).flatten().tolist())
        image.putpalette([255, 255, 255, 0, 0, 0])
    elif mode == "I;16":
        image = Image.fromarray(MASK.astype(np.uint16))
    else:
        image = grey.convert(mode)
    image.save(tmp_path / "mask.PNG")
    assert torch.equal(load_mask(str(tmp_path / "mask.PNG"), (2, 3)), torch.from_numpy(MASK.astype(bool)))


def test_wrong_mask_files_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "good.npy", MASK)
    np.save(tmp_path / "empty.npy", MASK * 0)
    np.save(tmp_path / "nan.npy", MASK * float("nan"))
    np.save(tmp_path / "text.npy", MASK.astype(str))
    np.save(tmp_path / "objects.npy", MASK.astype(object), allow_pickle=True)
    np.savez(tmp_path / "two.npz", a=MASK, b=MASK)
    np.savez(tmp_path / "truncated.npz", mask=MASK)
    Image.fromarray(MASK).save(tmp_path / "truncated.png")
    for name in ("truncated.npz", "truncated.png"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    for suffix in ("npy", "npz", "png"):
        (tmp_path / f"noise.{suffix}").write_bytes(b"this is no mask at all")
        (tmp_path / f"nothing.{suffix}").write_bytes(b"")
    (tmp_path / "good.npy").with_suffix(".npz").write_bytes((tmp_path / "good.npy").read_bytes())
    (tmp_path / "archive.npy").write_bytes((tmp_path / "two.npz").read_bytes())
    messages = {
        "missing.npy": "does not exist",
        "good.jpg": "of no kind",
        "empty.npy": "is empty",
        "nan.npy": "NaN",
        "text.npy": "numbers or booleans",
        "objects.npy": "seems broken",
        "two.npz": "name one of them mask",
        "truncated.npz": "seems broken",
        "truncated.png": "seems broken",
        **{f"{name}.{suffix}": "seems broken" for name in ("noise", "nothing") for suffix in ("npy", "npz", "png")},
        "good.npz": r"name it \.npy",
        "archive.npy": r"name it \.npz",
    }
    for name, message in messages.items():
        with pytest.raises(UserError, match=message):
            load_mask(tmp_path / name, (2, 3))
    with pytest.raises(UserError, match=r"has shape \(2, 3\) and the images have 3×2 pixels"):
        load_mask(tmp_path / "good.npy", (3, 2))


def test_pixel_iou_is_the_mean_of_each_images_own() -> None:
    maps, masks = torch.rand(9, 6, 5), torch.rand(9, 6, 5) < 0.3
    metric = PixelIoU(share=0.3)
    metric.update(maps[:4], masks[:4])
    metric.update(maps[4:], masks[4:])
    total = 0.0
    for values, mask in zip(maps.numpy(), masks.numpy(), strict=True):
        top = np.zeros(30, dtype=bool)
        top[np.argsort(-values.flatten(), kind="stable")[:9]] = True
        total += (top & mask.flatten()).sum() / (top | mask.flatten()).sum()
    assert float(metric.compute()) == pytest.approx(total / 9, rel=1e-12)


def test_one_mask_for_all_images() -> None:
    maps, mask = torch.rand(4, 6, 5), stride_pattern(6, 5)
    shared, repeated = PixelIoU(0.2), PixelIoU(0.2)
    shared.update(maps, mask)
    repeated.update(maps, mask.expand(4, 6, 5))
    assert float(shared.compute()) == float(repeated.compute())


@pytest.mark.parametrize(("maps", "masks"), [((4, 6, 5), (3, 6, 5)), ((4, 3, 6, 5), (4, 6, 5)), ((4, 6, 5), (5, 6))])
def test_maps_and_masks_that_do_not_fit_are_refused(maps: tuple[int, ...], masks: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="PixelIoU: maps of shape"):
        PixelIoU(0.5).update(torch.rand(maps), torch.ones(masks, dtype=torch.bool))
