# SPDX-License-Identifier: Apache-2.0
"""Steps of torchvision's detectors that people replace: an accelerated detector calls them as torchvision does.

Each is replaced on the module, on torchvision's class, by a subclass or in torchvision's module, before and after
accelerate(). It counts its calls in a training step and an evaluation, which must be as many as torchvision's own.
"""

import copy
import functools
import pickle
import subprocess
import sys
import time

import pytest
import torch
from helpers import small_detectors
from torch import nn
from torchvision.models import detection
from torchvision.models.detection import _utils, fcos, retinanet, roi_heads, rpn, transform
from torchvision.ops import boxes, poolers

import fpn_fast
from fpn_fast.nn import _own
from fpn_fast.nn.static_sampling import use_static_sampling


def build(kind):
    """In float64, where rounding changes no decision."""
    return small_detectors.detector(kind, **({"box_score_thresh": 0.0} if kind in ("mask", "keypoint") else {}))


def outcome(model, kind):
    """Losses and detections, as one flat list of (name, tensor)."""
    images, targets = small_detectors.training_batch()
    torch.manual_seed(5)
    losses = model.train()(images, targets)
    with torch.no_grad():
        found = model.eval()(images)
    every = [*losses.items(), *(item for each in found for item in each.items())]
    return [(name, each.detach()) for name, each in every]


def check_same(ours, theirs):
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    assert sum(len(each) for name, each in theirs if name == "boxes") > 0
    for (name, own), (_, other) in zip(ours, theirs, strict=True):
        # Keypoints are float32: their last bit may differ.
        close = 1e-9 if own.dtype == torch.float64 else 2**-22
        torch.testing.assert_close(own, other, rtol=close, atol=close, msg=name)


#: The steps of each detector that torchvision calls by an attribute: "path of the owner.name".
METHODS = {
    "mask": (
        "rpn.assign_targets_to_anchors", "rpn.compute_loss", "rpn.filter_proposals", "rpn._get_top_n_idx",
        "rpn.pre_nms_top_n", "rpn.post_nms_top_n", "rpn.head.forward", "rpn.anchor_generator.forward",
        "rpn.anchor_generator.grid_anchors", "rpn.anchor_generator.set_cell_anchors", "rpn.box_coder.decode",
        "rpn.box_coder.decode_single", "rpn.box_coder.encode", "rpn.box_coder.encode_single",
        "rpn.proposal_matcher.__call__", "rpn.proposal_matcher.set_low_quality_matches_", "rpn.fg_bg_sampler.__call__",
        "roi_heads.forward", "roi_heads.assign_targets_to_proposals", "roi_heads.subsample",
        "roi_heads.add_gt_proposals", "roi_heads.check_targets", "roi_heads.select_training_samples",
        "roi_heads.postprocess_detections", "roi_heads.has_mask", "roi_heads.box_coder.decode",
        "roi_heads.box_coder.decode_single", "roi_heads.box_coder.encode", "roi_heads.box_coder.encode_single",
        "roi_heads.proposal_matcher.__call__", "roi_heads.fg_bg_sampler.__call__", "roi_heads.box_roi_pool.forward",
        "roi_heads.mask_roi_pool.forward", "roi_heads.box_predictor.forward",
        "backbone.fpn.forward", "backbone.fpn.get_result_from_inner_blocks",
        "backbone.fpn.get_result_from_layer_blocks", "transform.forward", "transform.normalize", "transform.resize",
        "transform.torch_choice", "transform.batch_images", "transform.max_by_axis", "transform.postprocess",
        "eager_outputs",
    ),
    "keypoint": (
        "roi_heads.forward", "roi_heads.postprocess_detections", "roi_heads.has_keypoint",
        "roi_heads.keypoint_roi_pool.forward", "roi_heads.keypoint_predictor.forward",
    ),
    "retinanet": (
        "forward", "compute_loss", "postprocess_detections", "eager_outputs", "head.forward", "head.compute_loss",
        "head.classification_head.compute_loss", "head.classification_head.forward",
        "head.regression_head.compute_loss", "head.regression_head.box_coder.encode_single",
        "box_coder.decode_single", "anchor_generator.forward", "anchor_generator.grid_anchors",
        "proposal_matcher.__call__", "proposal_matcher.set_low_quality_matches_", "transform.postprocess",
    ),
    "fcos": (
        "forward", "compute_loss", "postprocess_detections", "eager_outputs", "head.compute_loss",
        "head.box_coder.encode", "head.box_coder.decode", "box_coder.decode", "anchor_generator.forward",
    ),
    "ssd": (
        "forward", "compute_loss", "postprocess_detections", "eager_outputs", "box_coder.encode_single",
        "box_coder.decode_single", "anchor_generator.forward", "proposal_matcher.__call__", "head.forward",
    ),
}  # fmt: skip

#: Questions without an effect, which the fused path asks more or less often.
ASKED_AT_OTHER_TIMES = (
    *("rpn.pre_nms_top_n", "rpn.post_nms_top_n"),
    *("roi_heads.has_mask", "roi_heads.has_keypoint"),
)

#: The functions that torchvision looks up in its modules.
FUNCTIONS = {
    "mask": (
        (rpn, "concat_box_prediction_layers"), (rpn, "permute_and_flatten"), (_utils, "_topk_min"),
        (_utils, "encode_boxes"), (boxes, "clip_boxes_to_image"), (boxes, "remove_small_boxes"),
        (boxes, "batched_nms"), (boxes, "nms"), (boxes, "box_iou"), (boxes, "box_area"),
        (roi_heads, "fastrcnn_loss"), (roi_heads, "maskrcnn_loss"), (roi_heads, "maskrcnn_inference"),
        (roi_heads, "project_masks_on_boxes"), (roi_heads, "roi_align"), (roi_heads, "paste_mask_in_image"),
        (roi_heads, "expand_boxes"), (roi_heads, "expand_masks"), (transform, "paste_masks_in_image"),
        (transform, "resize_boxes"), (transform, "_resize_image_and_masks"), (poolers, "roi_align"),
        (poolers, "_multiscale_roi_align"), (poolers, "_filter_input"), (poolers, "_convert_to_roi_format"),
        (poolers, "_setup_scales"), (poolers, "initLevelMapper"), (poolers, "box_area"),
    ),
    "keypoint": (
        (roi_heads, "keypointrcnn_loss"), (roi_heads, "keypointrcnn_inference"), (roi_heads, "keypoints_to_heatmap"),
        (roi_heads, "heatmaps_to_keypoints"), (transform, "resize_keypoints"),
    ),
    "retinanet": (
        (retinanet, "sigmoid_focal_loss"), (retinanet, "_sum"), (retinanet, "_box_loss"), (boxes, "box_iou"),
        (boxes, "batched_nms"), (boxes, "clip_boxes_to_image"), (_utils, "_topk_min"),
    ),
    "fcos": (
        (fcos, "sigmoid_focal_loss"), (fcos, "generalized_box_iou_loss"), (boxes, "batched_nms"),
        (boxes, "clip_boxes_to_image"), (_utils, "_topk_min"),
    ),
    "ssd": (
        (boxes, "box_iou"), (boxes, "batched_nms"), (boxes, "clip_boxes_to_image"), (_utils, "_topk_min"),
        (_utils, "encode_boxes"),
    ),
}  # fmt: skip


def counting(step, calls):
    def counted(*arguments, **options):
        calls.append(step)
        return step(*arguments, **options)

    return counted


def on_instance(model, path, calls, monkeypatch):
    owner, name = owner_of(model, path)
    setattr(owner, name, counting(getattr(owner, name), calls))


def on_torchvisions_class(model, path, calls, monkeypatch):
    owner, name = owner_of(model, path)
    theirs = next(k for k in type(owner).__mro__ if name in vars(k) and k.__module__.startswith("torchvision."))
    monkeypatch.setattr(theirs, name, counting(vars(theirs)[name], calls))


def by_a_subclass(model, path, calls, monkeypatch):
    owner, name = owner_of(model, path)
    kind = type(owner)
    owner.__class__ = type("Mine", (kind,), {name: counting(getattr(kind, name), calls)})


def owner_of(model, path):
    *parts, name = path.split(".")
    return functools.reduce(getattr, parts, model), name


def counted(model, kind, calls):
    calls.clear()
    found = outcome(model, kind)
    return found, len(calls)


@functools.cache
def of_torchvision(kind, patch):
    """(losses and detections, path -> how often torchvision calls the method), of one run that counts all methods."""
    model, calls = build(kind), {path: [] for path in METHODS[kind]}
    with pytest.MonkeyPatch.context() as patched:
        for path, own in calls.items():
            patch(model, path, own, patched)
        found = outcome(model, kind)
    return found, {path: len(own) for path, own in calls.items()}


@functools.cache
def functions_of_torchvision(kind):
    """The same of the functions: (module, name) -> how often it is called."""
    model, calls = build(kind), {function: [] for function in FUNCTIONS[kind]}
    with pytest.MonkeyPatch.context() as patched:
        for (module, name), own in calls.items():
            patched.setattr(module, name, counting(getattr(module, name), own))
        found = outcome(model, kind)
    return found, {function: len(own) for function, own in calls.items()}


@pytest.mark.parametrize(
    ("kind", "path", "patch", "before"),
    [
        # Ways take turns: each method and each patch is replaced before the swap and after it.
        (kind, path, patch, (i + j) % 2 == 0)
        for kind, paths in METHODS.items()
        for i, path in enumerate(paths)
        for j, patch in enumerate((on_instance, on_torchvisions_class, by_a_subclass))
        # Python looks up __call__ in the class.
        if not (patch is on_instance and path.endswith("__call__"))
    ],
)
def test_a_replaced_method_is_called_as_torchvision_calls_it(kind, path, patch, before, monkeypatch):
    calls, (expected, times_of) = [], of_torchvision(kind, patch)
    times = times_of[path]
    assert times > 0
    fast = build(kind)
    with monkeypatch.context() as patched:
        if not before:
            fpn_fast.accelerate(fast)
        patch(fast, path, calls, patched)
        if before:
            fpn_fast.accelerate(fast)
        found, own_times = counted(fast, kind, calls)
        check_same(found, expected)
        assert own_times == times or (own_times > 0 and path in ASKED_AT_OTHER_TIMES)
    if patch is on_torchvisions_class:
        # What was put back is torchvision's own again.
        assert not list(_own.changed_steps(fast, set()))


@pytest.mark.parametrize(
    ("kind", "module", "name"),
    [(kind, *function) for kind, functions in FUNCTIONS.items() for function in functions],
    ids=lambda each: each if isinstance(each, str) else each.__name__.rpartition(".")[2],
)
def test_a_replaced_function_is_called_as_torchvision_calls_it(kind, module, name, monkeypatch):
    calls, (expected, times_of) = [], functions_of_torchvision(kind)
    fast = build(kind)
    fpn_fast.accelerate(fast)
    monkeypatch.setattr(module, name, counting(getattr(module, name), calls))
    found, own_times = counted(fast, kind, calls)
    check_same(found, expected)
    assert own_times == times_of[module, name] > 0


@pytest.mark.parametrize("is_anchor_generator", [False, True], ids=["others", "anchor_generator"])
@pytest.mark.parametrize("kind", METHODS)
def test_forward_hooks_of_every_module_are_called(kind, is_anchor_generator):
    plain, fast = (build(kind) for _ in range(2))
    fpn_fast.accelerate(fast)
    found = []
    for model in (plain, fast):
        calls = []
        for name, module in model.named_modules():
            if name.endswith("anchor_generator") == is_anchor_generator:
                module.register_forward_hook(lambda *_, name=name, calls=calls: calls.append(name))
                module.register_forward_pre_hook(lambda *_, name=name, calls=calls: calls.append(name))
        found.append((outcome(model, kind), calls))
    (theirs, their_calls), (ours, our_calls) = found
    check_same(ours, theirs)
    assert sorted(our_calls) == sorted(their_calls)
    assert their_calls


def test_a_hook_may_change_anchors():
    for kind in ("mask", "retinanet", "fcos"):
        plain, fast = (build(kind) for _ in range(2))
        fpn_fast.accelerate(fast)
        for model in (plain, fast):
            generator = getattr(model, "rpn", model).anchor_generator
            generator.register_forward_hook(lambda _, given, result: [each + 3 for each in result])
        check_same(outcome(fast, kind), outcome(plain, kind))


def test_another_loss_is_trained_on():
    """The usual way to try one, and the other alpha that people set."""
    model = build("mask")
    model.rpn.compute_loss = lambda scores, deltas, *_: (scores.sum() * 0 + 100, deltas.sum() * 0 + 200)
    report = fpn_fast.accelerate(model)
    losses = dict(outcome(model, "mask")[:5])
    assert (losses["loss_objectness"].item(), losses["loss_rpn_box_reg"].item()) == (100, 200)
    notes = {entry.name: entry.note for entry in report.swapped}
    expected = "now fpn_fast.RegionProposalNetwork; its library's code runs where you changed compute_loss"
    assert notes["rpn"] == expected
    assert all(note.startswith("now ") and ";" not in note for name, note in notes.items() if name != "rpn")


def test_the_report_names_what_is_changed_in_parts(monkeypatch):
    model = build("retinanet")
    monkeypatch.setattr(retinanet, "sigmoid_focal_loss", functools.partial(retinanet.sigmoid_focal_loss, alpha=0.5))
    model.box_coder.decode_single = model.box_coder.decode_single
    model.anchor_generator.register_forward_hook(lambda *_: None)
    notes = {entry.name: entry.note for entry in fpn_fast.accelerate(model).swapped}
    assert notes[""].endswith("changed box_coder.decode_single, head.classification_head.sigmoid_focal_loss")
    assert notes["anchor_generator"].endswith("changed forward hooks")


@pytest.mark.parametrize("kind", METHODS)
def test_nothing_is_taken_for_changed_that_is_torchvisions_own(kind):
    model = build(kind)
    assert all(entry.note.count(" ") == 1 for entry in fpn_fast.accelerate(model).swapped)
    assert not list(_own.changed_steps(model, set()))


BEFORE_THE_IMPORT = """
import functools
from torchvision.models.detection import retinanet, rpn
own_loss, original = [], rpn.RegionProposalNetwork.compute_loss
@functools.wraps(original)
def compute_loss(*arguments):
    own_loss.append(1)
    return original(*arguments)
rpn.RegionProposalNetwork.compute_loss = compute_loss
retinanet.sigmoid_focal_loss = functools.partial(retinanet.sigmoid_focal_loss, alpha=0.5)
import test_patched_steps as tests
models = {kind: tests.build(kind) for kind in ("mask", "retinanet")}
expected = tests.outcome(models["retinanet"], "retinanet")
for kind, model in models.items():
    tests.fpn_fast.accelerate(model)
tests.outcome(models["mask"], "mask")
tests.check_same(tests.outcome(models["retinanet"], "retinanet"), expected)
print(len(own_loss))
"""


def test_what_was_replaced_before_the_import_is_called():
    run = subprocess.run(
        [sys.executable, "-c", BEFORE_THE_IMPORT], capture_output=True, text=True, cwd=__file__.rpartition("/")[0]
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["1"]


def both(losses, detections):
    return losses, detections


def test_copies_and_restored_models_keep_what_is_replaced():
    model = build("retinanet")
    model.eager_outputs = both
    fpn_fast.accelerate(model)
    images, _ = small_detectors.training_batch()
    copies = [model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    copies.append(copy.deepcopy(model))
    fpn_fast.restore(copies[-1])
    for each in copies:
        losses, found = each.eval()(images)
        assert losses == {}
        assert len(found[0]["boxes"]) > 0
    fpn_fast.restore(model)
    assert type(model) is detection.RetinaNet
    assert vars(model)["eager_outputs"] is both


STATIC = (
    *("rpn.assign_targets_to_anchors", "rpn.compute_loss", "rpn.filter_proposals", "rpn._get_top_n_idx"),
    *("rpn.box_coder.encode", "rpn.anchor_generator.forward", "roi_heads.select_training_samples"),
    *("roi_heads.add_gt_proposals", "roi_heads.assign_targets_to_proposals", "roi_heads.subsample"),
    *("roi_heads.box_coder.encode", "roi_heads.fg_bg_sampler.sample", "rpn.fg_bg_sampler.sample"),
)


@pytest.mark.parametrize("patch", [on_instance, by_a_subclass])
@pytest.mark.parametrize("path", STATIC)
def test_static_sampling_calls_replaced_methods(path, patch, monkeypatch):
    model = build("mask")
    fpn_fast.accelerate(model)
    use_static_sampling(model)
    calls = []
    patch(model, path, calls, monkeypatch)
    losses = dict(outcome(model, "mask")[:5])
    assert len(calls) > 0
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())


@pytest.mark.parametrize("name", ["fastrcnn_loss", "maskrcnn_loss", "project_masks_on_boxes"])
def test_static_sampling_calls_replaced_functions(name, monkeypatch):
    """With proposals alone: torchvision would take the padding for background."""
    model = build("mask")
    fpn_fast.accelerate(model)
    use_static_sampling(model)
    calls, areas = [], []
    monkeypatch.setattr(roi_heads, name, counting(getattr(roi_heads, name), calls))
    # Few proposals are left, so that there is padding.
    model.rpn.nms_thresh = 0.01
    model.roi_heads.box_roi_pool.register_forward_pre_hook(
        lambda _, given: areas.extend((each[:, 2:] - each[:, :2]).min() for each in given[1])
    )
    outcome(model, "mask")
    assert len(calls) > 0
    assert min(areas) > 0


def test_static_sampling_refuses_a_sampler_that_is_changed(monkeypatch):
    model = build("mask")
    sampler = _utils.BalancedPositiveNegativeSampler
    monkeypatch.setattr(sampler, "__call__", counting(sampler.__call__, []))
    with pytest.raises(TypeError, match="static sampling replaces it"):
        use_static_sampling(model)


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        *(("mask", path) for path in ("rpn.filter_proposals", "rpn.forward", "rpn.box_coder.decode")),
        *(("mask", f"roi_heads.{name}") for name in ("forward", "postprocess_detections", "box_coder.decode_single")),
        *(("mask", path) for path in ("transform.normalize", "transform.resize", "rpn.anchor_generator.grid_anchors")),
        *(("retinanet", path) for path in ("postprocess_detections", "box_coder.decode_single", "transform.forward")),
        *(("fcos", path) for path in ("postprocess_detections", "box_coder.decode", "anchor_generator.forward")),
        *(("ssd", path) for path in ("postprocess_detections", "box_coder.decode_single", "anchor_generator.forward")),
    ],
)  # fmt: skip
def test_a_static_detector_refuses_what_it_would_not_call(kind, path):
    model = build(kind).eval()
    fpn_fast.accelerate(model)
    fpn_fast.StaticDetector(model, (64, 96), 1)
    owner, name = owner_of(model, path)
    setattr(owner, name, getattr(owner, name))
    with pytest.raises(TypeError, match=rf"must be torchvision's own, got a changed .*{name}"):
        fpn_fast.StaticDetector(model, (64, 96), 1)
    delattr(owner, name)
    if isinstance(owner, nn.Module) and owner is not model:
        owner.register_forward_hook(lambda *_: None)
        with pytest.raises(TypeError, match="got a changed forward hooks"):
            fpn_fast.StaticDetector(model, (64, 96), 1)


def test_the_checks_take_less_than_a_hundredth_of_an_inference(monkeypatch):
    model = detection.fasterrcnn_mobilenet_v3_large_fpn(
        weights=None, weights_backbone=None, min_size=320, max_size=544
    ).eval()
    fpn_fast.accelerate(model)
    spent, images = [], [torch.rand(3, 320, 544)]
    for kind in (_own.Steps, _own.Part):
        changed = kind.changed

        def timed(self, module, changed=changed):
            start = time.perf_counter()
            found = changed(self, module)
            # A part's check contains that of its steps, which counts too: at most twice.
            spent.append(time.perf_counter() - start)
            return found

        monkeypatch.setattr(kind, "changed", timed)
    with torch.no_grad():
        model(images)
        shares = []
        for _ in range(5):
            spent.clear()
            start = time.perf_counter()
            model(images)
            shares.append(sum(spent) / (time.perf_counter() - start))
    assert len(spent) > 5
    assert sorted(shares)[2] < 0.01
