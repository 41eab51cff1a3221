# SPDX-License-Identifier: Apache-2.0
"""StaticDetector against the lists that its model gives."""

import copy
import functools

import numpy as np
import pytest
import torch
from helpers import small_detectors
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models import detection

import fpn_fast
from fpn_fast import StaticDetector

SIZE = (60, 90)
KINDS = list(small_detectors.KINDS)


@functools.cache
def accelerated(kind):
    """With frozen norms, whose bits do not depend on who computes them: torch in a graph, one pass in eager mode."""
    others = {} if kind == "ssd" else {"body": small_detectors.residual_backbone, "max_size": 100}
    model = small_detectors.detector(kind, **others).float()
    small_detectors.calibrate(model)
    fpn_fast.accelerate(model)
    return model.eval()


def images(*size, count=2):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1))


def check(found, expected, exact=True):
    assert len(found) == len(expected)
    for own, other in zip(found, expected, strict=True):
        assert own.keys() == other.keys()
        assert len(other["boxes"]) > 3
        for name in other:
            # Convolutions of another batch round otherwise; boxes are in pixels.
            close = 0 if exact else 1e-3 if name == "boxes" else 1e-4
            torch.testing.assert_close(own[name], other[name], rtol=0, atol=close)


@pytest.mark.parametrize("kind", KINDS)
def test_is_the_list_form(kind):
    model = copy.deepcopy(accelerated(kind)).eval()  # of poolers that have not seen an image
    detector = StaticDetector(model, SIZE, 2)
    batch = images(*SIZE)
    found = detector(batch)
    with torch.no_grad():
        expected = model(list(batch))
    check(detector.unpad(found), expected)
    most = found["scores"].shape[1]
    there = torch.arange(most) < found["counts"][:, None]
    for name in found.keys() - {"counts"}:
        assert found[name].shape[:2] == (2, most)
        assert not found[name][~there].any()
        assert not found[name].requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_batched_tensor_is_a_list_of_images(kind):
    batch = images(*SIZE)
    with torch.no_grad():
        check(accelerated(kind)(batch), accelerated(kind)(list(batch)))
        check(StaticDetector(accelerated(kind), SIZE, 2).detect(batch), accelerated(kind)(list(batch)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_device_does_not_matter(kind):
    """torchvision's RetinaNet and FCOS take images of the CPU under any; so do all of ours, but for SSD's anchors."""
    batch, model = images(*SIZE), copy.deepcopy(accelerated(kind)).eval()
    with torch.no_grad():
        expected = accelerated(kind)(list(batch))
        with torch.device("meta"):
            if kind != "ssd":
                check(model(list(batch)), expected)
            check(StaticDetector(model, SIZE, 2).detect(batch), expected)


def test_a_retinanet_is_packaged(tmp_path):
    """Its head has no centerness: AOTInductor hands over None, and no empty list. Of one map, to compile fast."""
    torch.manual_seed(0)
    body = nn.Conv2d(3, 8, 3, 16, 1)
    body.out_channels = 8
    anchors = detection.anchor_utils.AnchorGenerator(((24,),), ((1.0,),))
    model = detection.RetinaNet(body, 3, min_size=64, max_size=96, anchor_generator=anchors, score_thresh=0.0).eval()
    small_detectors.calibrate(model)
    fpn_fast.accelerate(model)
    batch, detector = images(*SIZE, count=1), StaticDetector(model, SIZE, 1)
    expected = detector.unpad(detector(batch))
    found = detector.compile(tmp_path)(batch)
    again = torch._inductor.aoti_load_package(str(tmp_path / "60x90.pt2"))(batch, torch.tensor([SIZE]).float())
    assert all(torch.equal(again[name], found[name]) for name in found)
    check(detector.unpad(found), expected, exact=False)


# Of mask faster is a part.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "faster"])
def test_one_graph_when_compiled_and_exported(kind):
    """Also of a model that never ran before."""
    detector, batch = StaticDetector(copy.deepcopy(accelerated(kind)).eval(), SIZE, 2), images(*SIZE)
    expected = StaticDetector(accelerated(kind), SIZE, 2)(batch)
    torch._dynamo.reset()
    compiled = torch.compile(detector, fullgraph=True, backend="eager")(batch)
    exported = torch.export.export(StaticDetector(copy.deepcopy(accelerated(kind)).eval(), SIZE, 2), (batch,))
    again = exported.module()(batch)
    for name in expected:
        assert torch.equal(compiled[name], expected[name])
        assert torch.equal(again[name], expected[name])


@pytest.mark.parametrize("kind", KINDS)
def test_never_waits(kind):
    """On fake CUDA tensors, of which no value can be asked."""
    detector = StaticDetector(copy.deepcopy(accelerated(kind)).eval(), SIZE, 2)
    with FakeTensorMode():
        tensors = {
            name: torch.empty(each.shape, dtype=each.dtype, device="cuda")
            for name, each in (*detector.named_parameters(), *detector.named_buffers())
        }
        found = torch.func.functional_call(detector, tensors, (torch.empty(2, 3, *SIZE, device="cuda"),))
    assert {each.device.type for each in found.values()} == {"cuda"}
    assert tuple(found["boxes"].shape) == (2, 10, 4)


@pytest.mark.parametrize("most", [5, 40, 0])
def test_max_detections(most):
    for kind in ("mask", "fcos", "ssd"):
        batch = images(*SIZE)
        usual = StaticDetector(accelerated(kind), SIZE, 2)(batch)
        found = StaticDetector(accelerated(kind), SIZE, 2, max_detections=most)(batch)
        assert tuple(found["boxes"].shape) == (2, most, 4)
        for name in usual.keys() - {"counts"}:
            assert found[name].shape[1] == most
            common = min(most, usual[name].shape[1])
            # Convolutions of another batch round otherwise.
            close = 1e-5 if name == "masks" else 0
            torch.testing.assert_close(found[name][:, :common], usual[name][:, :common], rtol=0, atol=close)
        assert found["counts"].max() <= most


def test_masks_above_a_threshold():
    batch, model = images(*SIZE), accelerated("mask")
    usual = StaticDetector(model, SIZE, 2)(batch)["masks"]
    found = StaticDetector(model, SIZE, 2, mask_threshold=0.45)(batch)["masks"]
    assert found.dtype == torch.bool
    assert torch.equal(found, usual > 0.45)
    assert 0 < found.sum() < (usual > 0).sum()
    with pytest.raises(ValueError, match=r"mask_threshold is for a Mask R-CNN, got 0\.5 for a FCOS"):
        StaticDetector(accelerated("fcos"), SIZE, 1, mask_threshold=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_has_no_upload_and_no_read(kind):
    found = fpn_fast.profile.budget(StaticDetector(accelerated(kind), SIZE, 2), images(*SIZE))
    total = found.as_dict()["parts"]["total"]
    assert (total["syncs"], total["uploads"]) == (0, 0)


def test_several_sizes_and_smaller_images():
    """The smallest that fits; an image of exactly a size as the model alone has it, a smaller one as one padded."""
    model = accelerated("mask")
    detector = StaticDetector(model, [(96, 96), SIZE], 2)
    assert detector.image_sizes == [SIZE, (96, 96)]
    generator = torch.Generator().manual_seed(2)
    exact = [torch.rand(3, *SIZE, generator=generator) for _ in range(3)]
    with torch.no_grad():
        # The third is alone in its batch.
        check(detector.detect(exact), model(exact[:2]) + model(exact[2:]), exact=False)
    assert detector.detect([]) == []

    small = torch.rand(3, 50, 70, generator=generator)
    alone, beside = detector.detect([small])[0], detector.detect([small, exact[0]])[0]
    check([alone], [beside], exact=False)
    assert len(alone["boxes"]) > 3
    assert alone["masks"].shape[2:] == (50, 70)
    assert (alone["boxes"] <= torch.tensor([70, 50, 70, 50])).all()
    # What lies around an image does not matter.
    around = torch.rand(2, 3, *SIZE, generator=generator)
    sizes = torch.tensor([[50, 70]] * 2)
    around[:, :, :50, :70] = small
    framed = detector.unpad(detector(around, sizes))[0]
    names = ("boxes", "scores", "labels")
    check([{name: framed[name] for name in names}], [{name: alone[name] for name in names}], exact=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kept_detection_holds_no_memory_but_its_own(kind):
    model, (small, exact) = accelerated(kind), (images(50, 70, count=1)[0], images(*SIZE, count=1)[0])
    detector = StaticDetector(model, SIZE, 2)
    with torch.no_grad():
        # The lists of torchvision's two-stage models are parts of a tensor of all detections, masks apart.
        of_model = model([small, exact]) if kind in ("retinanet", "fcos") else []
    found = [*detector.detect([small, exact, small]), *detector.unpad(detector(images(*SIZE))), *of_model]
    for each in found:
        assert len(each["boxes"]) > 3
        for tensor in each.values():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_other_dtypes_and_moves():
    model = copy.deepcopy(accelerated("retinanet")).eval()
    detector = StaticDetector(model, SIZE, 1).bfloat16()
    assert model.head.classification_head.cls_logits.weight.dtype == torch.bfloat16
    batch = images(*SIZE, count=1).bfloat16()
    found = detector(batch)
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    with torch.no_grad():
        check(detector.unpad(found), model(list(batch)))
    assert detector.state_dict().keys() == {f"model.{key}" for key in model.state_dict()}


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (64, [(64, 64)]), (np.int64(64), [(64, 64)]), (np.array([60, 64]), [(60, 64)]), ([64, 96], [(64, 96)]),
        ([np.array([64, 96]), (np.int16(32), 32)], [(32, 32), (64, 96)]),
    ],
    ids=str,
)  # fmt: skip
def test_sizes_are_numbers_of_numpy_or_one_for_both(size, expected):
    detector = StaticDetector(accelerated("fcos"), size, np.int64(1), max_detections=np.int32(7))
    assert detector.image_sizes == expected
    assert {type(side) for each in detector.image_sizes for side in each} == {int}
    assert detector(images(*expected[0], count=1))["boxes"].shape == (1, 7, 4)


def test_errors():
    model = accelerated("fcos")
    for size in (None, 6.5, "64", (60.0, 64)):
        with pytest.raises(TypeError, match="image_size must be an integer"):
            StaticDetector(model, size, 1)
    with pytest.raises(ValueError, match="image_size must be one integer or two"):
        StaticDetector(model, (3, 60, 64), 1)
    detector = StaticDetector(model, SIZE, 2)
    with pytest.raises(ValueError, match=r"images must be \(2, 3, 60, 90\), got \(1, 3, 60, 90\)"):
        detector(images(*SIZE, count=1))
    with pytest.raises(ValueError, match=r"got \(2, 3, 61, 90\)"):
        detector(images(61, 90))
    with pytest.raises(ValueError, match=r"torch.float32 on cpu, got torch.float64 on cpu"):
        detector(images(*SIZE).double())
    with pytest.raises(ValueError, match=r"on cpu, got torch.float32 on meta"):
        detector(images(*SIZE).to("meta"))
    with pytest.raises(ValueError, match=r"sizes must be \(2, 2\)"):
        detector(images(*SIZE), torch.ones(2))
    with pytest.raises(ValueError, match=r"image of \(60, 91\) fits into none"):
        detector.detect([torch.rand(3, 60, 91)])
    good = images(*SIZE, count=1)[0]
    for bad, message in (
        (
            torch.zeros(3, 50, 70, dtype=torch.uint8),
            r"torch.float32 on cpu, got torch.uint8 on cpu at 1; divide by 255",
        ),
        (good.double(), r"torch.float32 on cpu, got torch.float64 on cpu at 1$"),
        (good.to("meta"), r"torch.float32 on cpu, got torch.float32 on meta at 1$"),
        (torch.zeros(4, 50, 70), r"images must be \[3, h, w\] of at least 1 x 1 pixel, got \(4, 50, 70\) at 1"),
        (torch.zeros(50, 70), r"images must be \[3, h, w\].*got \(50, 70\) at 1"),
        (torch.zeros(3, 0, 70), r"images must be \[3, h, w\].*got \(3, 0, 70\) at 1"),
    ):
        with pytest.raises(ValueError, match=message):
            detector.detect([good, bad])
    with pytest.raises(TypeError, match="images must be tensors, got ndarray at 1"):
        detector.detect([good, good.numpy()])
    with pytest.raises(ValueError, match=r"images must be \[3, h, w\].*got \(60, 90\) at 0"):
        detector.detect(good)
    with pytest.raises(ValueError, match="positive"):
        StaticDetector(model, SIZE, 0)
    with pytest.raises(ValueError, match="positive"):
        StaticDetector(model, (0, 5), 1)
    with pytest.raises(ValueError, match="max_detections"):
        StaticDetector(model, SIZE, 1, max_detections=-1)
    with pytest.raises(RuntimeError, match="the model is on cpu"):
        detector.capture()
    with pytest.raises(ValueError, match="evaluation mode"):
        StaticDetector(copy.deepcopy(model).train(), SIZE, 2)(images(*SIZE))


def test_only_accelerated_detectors():
    plain = copy.deepcopy(accelerated("faster"))
    plain.roi_heads.__class__ = detection.roi_heads.RoIHeads
    with pytest.raises(TypeError, match=r"roi_heads must be RoIHeads after fpn_fast.accelerate"):
        StaticDetector(plain, SIZE, 1)
    for other in (nn.Linear(2, 2), small_detectors.detector("fcos")):
        with pytest.raises(TypeError, match="model must be a Faster"):
            StaticDetector(other, SIZE, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_graph_replays(kind):
    detector = StaticDetector(copy.deepcopy(accelerated(kind)).eval(), [SIZE, (96, 96)], 2).cuda()
    batches = [images(*SIZE).cuda(), images(*SIZE).flip(0).cuda(), images(96, 96).cuda()]
    expected = [detector(batch) for batch in batches]
    with torch.inference_mode():
        detector.capture()
    torch.cuda.set_sync_debug_mode("error")
    try:
        # The next call overwrites them.
        found = [{name: each.clone() for name, each in detector(batch).items()} for batch in batches]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for own, other in zip(found, expected, strict=True):
        for name in other:
            assert torch.equal(own[name], other[name])
    first = detector(batches[0])
    assert all(detector(batches[1])[name].data_ptr() == first[name].data_ptr() for name in first)


@pytest.mark.parametrize("size", [(46, 82), (52, 47), (55, 61)])
def test_whole_images_are_as_large_as_they_are_resized_to(size, monkeypatch):
    """Sizes whose quotient of what they are resized to, times themselves, is a little below it in float32."""
    model = accelerated("fcos")
    resized, _ = model.transform.resize(torch.empty(3, *size, device="meta"))
    original, target = (torch.tensor(each, dtype=torch.float32) for each in (size, resized.shape[1:]))
    assert ((original * (target / original)).floor() < target).any()
    seen, detections = [], model.detections
    monkeypatch.setattr(model, "detections", lambda i, **o: seen.append(i.image_sizes) or detections(i, **o))
    StaticDetector(model, size, 2)(images(*size))
    assert seen[0].tolist() == [list(resized.shape[1:])] * 2
