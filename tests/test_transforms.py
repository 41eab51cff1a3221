# SPDX-License-Identifier: Apache-2.0
"""Every op under torch.func's transforms and forward-mode differentiation: right, or a clear error, never zero."""

import copy
from functools import partial

import pytest
import torch
import torchvision
from helpers import calls
from helpers.small_detectors import detector, training_batch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

import fpn_fast
from fpn_fast import nn, ops

OF_ANY_LENGTH = (calls.nms, calls.batched_nms)
PADDED = [each for each in (*calls.RECIPES, *calls.VARIANTS) if each not in OF_ANY_LENGTH]


def maximum(generator, dtype):
    call = calls.multiscale_roi_align(generator, dtype)
    return calls.Call(call.op, call.arguments | {"pool_mode": "max"}, call.kinds, call.sums)


maximum.__name__ = "multiscale_roi_align_max"
# Those that select compute the values of what they selected again.
SELECTING = [calls.select_detections, calls.select_detections_by_distances, calls.select_box_detections,
             calls.heatmaps_to_keypoints]  # fmt: skip
DIFFERENTIABLE = [calls.top_down, calls.upsample_add, calls.multiscale_roi_align, calls.roi_align,
                  calls.sigmoid_focal_loss, calls.frozen_batch_norm, calls.paste_masks, maximum, calls.fuse_maps,
                  calls.resize_cat, *SELECTING]  # fmt: skip
DECIDING = [each for each in (*PADDED, *OF_ANY_LENGTH) if each not in DIFFERENTIABLE]


def of(recipes):
    return pytest.mark.parametrize("recipe", recipes, ids=lambda recipe: recipe.__name__)


def call_of(recipe):
    """(op of its tensors by name that returns a list, these)"""
    call = recipe(torch.Generator().manual_seed(0), torch.float64)
    tensors = {name: each for name, each in call.arguments.items() if any(isinstance(t, Tensor) for t in leaves(each))}
    others = {name: each for name, each in call.arguments.items() if name not in tensors}
    return lambda given: leaves(call.op(**given, **others)), tensors


def leaves(tree) -> list:
    return tree_leaves(tree)


def others_like(tensors, seed=1):
    """Other numbers of the same kind: what is drawn as a float is moved, integers stay."""
    generator = torch.Generator().manual_seed(seed)
    return tree_map_only(
        Tensor, lambda t: t + torch.rand(t.shape, generator=generator) if t.is_floating_point() else t, tensors
    )


def first_of(recipe):
    """(loss of the maps or logits that have a gradient, these, a direction)"""
    op, tensors = call_of(recipe)
    maps = "laterals", "lateral", "top", "features", "input", "logits", "deltas", "centerness", "masks", "heatmaps"
    names = [name for name in (*maps, "maps", "x", "residual") if name in tensors]
    inputs, fixed = {name: tensors[name] for name in names}, {k: v for k, v in tensors.items() if k not in names}
    # Not linear, so that a direction's derivative depends on the place.
    loss = lambda given: sum(each.square().sum() for each in op({**given, **fixed}) if each.is_floating_point())  # noqa: E731
    return loss, inputs, others_like(tree_map(torch.zeros_like, inputs))


def by_autograd(loss, inputs):
    inputs = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(), inputs)
    return torch.autograd.grad(loss(inputs), leaves(inputs))


def check(found, expected):
    assert len(leaves(found)) == len(leaves(expected)) > 0
    for a, b in zip(leaves(found), leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@of([*PADDED, maximum])
@pytest.mark.parametrize("dim", [0, 1])
def test_vmap(backend, recipe, dim):
    op, tensors = call_of(recipe)
    samples = [tensors, others_like(tensors)]
    stacked = tree_map(lambda *each: torch.stack(each, min(dim, each[0].dim())), *samples)
    dims = tree_map(lambda t: min(dim, t.dim() - 1), stacked)
    expected = [torch.stack(each) for each in zip(*map(op, samples), strict=True)]
    check(vmap(op, in_dims=(dims,))(stacked), expected)


def test_vmap_over_some_tensors_twice_and_over_none(backend):
    op, tensors = call_of(calls.generate_proposals)
    sizes = torch.stack([tensors["image_sizes"], tensors["image_sizes"] // 2])
    of_sizes = lambda each: op({**tensors, "image_sizes": each})  # noqa: E731
    expected = [torch.stack(each) for each in zip(*map(of_sizes, sizes), strict=True)]
    check(vmap(of_sizes)(sizes), expected)
    twice = vmap(vmap(of_sizes))(torch.stack([sizes, sizes]))
    check(twice, [torch.stack([each, each]) for each in expected])
    with pytest.raises(ValueError, match="at least one sample"):
        vmap(of_sizes)(sizes[:0])


@of(OF_ANY_LENGTH)
def test_vmap_refuses_what_has_the_length_of_its_values(recipe):
    op, tensors = call_of(recipe)
    with pytest.raises(RuntimeError, match=r"vmap: .*\.item\(\)"):
        vmap(op)(tree_map(lambda t: torch.stack([t, t]), tensors))


@of(DIFFERENTIABLE)
def test_reverse_mode(backend, recipe):
    loss, inputs, _ = first_of(recipe)
    expected = by_autograd(loss, inputs)
    assert any(each.abs().sum() > 0 for each in expected)
    check(grad(loss)(inputs), expected)
    check(jacrev(loss)(inputs), expected)
    value, pull = vjp(loss, inputs)
    torch.testing.assert_close(value, loss(inputs))
    check(pull(torch.ones_like(value)), expected)


@of(DIFFERENTIABLE)
def test_reverse_mode_of_each_sample(backend, recipe):
    loss, inputs, _ = first_of(recipe)
    samples = [inputs, others_like(inputs)]
    stacked = tree_map(lambda *each: torch.stack(each), *samples)
    expected = [torch.stack(each) for each in zip(*(by_autograd(loss, each) for each in samples), strict=True)]
    check(vmap(grad(loss))(stacked), expected)
    check(grad(lambda given: vmap(loss)(given).sum())(stacked), expected)


@of(DIFFERENTIABLE)
def test_forward_mode(backend, recipe):
    loss, inputs, direction = first_of(recipe)
    derivatives = {
        "jvp": lambda: jvp(loss, (inputs,), (direction,))[1],
        "jacfwd": lambda: sum(
            (a * b).sum() for a, b in zip(leaves(jacfwd(loss)(inputs)), leaves(direction), strict=True)
        ),
        "dual": lambda: dual_derivative(loss, inputs, direction),
    }
    expected = sum((a * b).sum() for a, b in zip(by_autograd(loss, inputs), leaves(direction), strict=True))
    assert expected.abs() > 1
    # Keypoints and their scores are float32.
    rtol = 1e-5 if recipe is calls.heatmaps_to_keypoints else 1e-10
    if recipe in SELECTING:
        # One call for each of a thousand numbers.
        del derivatives["jacfwd"]
    for name, derivative in derivatives.items():
        if recipe is maximum:
            with pytest.raises(RuntimeError, match="no forward-mode derivative for pool_mode='max'"):
                derivative()
        else:
            torch.testing.assert_close(derivative().double(), expected, rtol=rtol, atol=0, msg=name)


def dual_derivative(loss, inputs, direction):
    with forward_ad.dual_level():
        duals = tree_map(forward_ad.make_dual, inputs, direction)
        return forward_ad.unpack_dual(loss(duals)).tangent


@of([calls.top_down, calls.multiscale_roi_align])
def test_tangent_of_one_map_alone(backend, recipe):
    loss, inputs, direction = first_of(recipe)
    (name,) = inputs
    expected = (by_autograd(loss, inputs)[1] * direction[name][1]).sum()
    of_second = lambda each: loss({name: [inputs[name][0], each, *inputs[name][2:]]})  # noqa: E731
    found = jvp(of_second, (inputs[name][1],), (direction[name][1],))[1]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


@of(DIFFERENTIABLE)
def test_second_derivatives_are_right_or_refused(backend, recipe):
    loss, inputs, direction = first_of(recipe)
    slope = lambda given: sum((a * b).sum() for a, b in zip(leaves(grad(loss)(given)), leaves(direction), strict=True))  # noqa: E731
    if recipe in (calls.multiscale_roi_align, calls.roi_align, maximum):
        with pytest.raises(RuntimeError, match="not differentiable twice"):
            grad(slope)(inputs)
        return
    if recipe in SELECTING:
        check(grad(slope)(inputs), by_autograd(lambda given: derivative(loss, given, direction), inputs))
        return
    step = 1e-5
    moved = [tree_map(lambda t, d, s=s: t + s * step * d, inputs, direction) for s in (1, -1)]
    expected = [(a - b) / (2 * step) for a, b in zip(*(leaves(grad(loss)(each)) for each in moved), strict=True)]
    for a, b in zip(leaves(grad(slope)(inputs)), expected, strict=True):
        # A difference of float64 gradients over 1e-5 has seven right digits.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def derivative(loss, inputs, direction):
    """Along a direction, by autograd."""
    gradients = torch.autograd.grad(loss(inputs), leaves(inputs), create_graph=True)
    return sum((a * b).sum() for a, b in zip(gradients, leaves(direction), strict=True))


def test_hessian_by_forward_over_reverse():
    rois = torch.tensor([[0.0, 1, 1, 14, 15]], dtype=torch.float64)
    pooled = lambda x: ops.roi_align(x, rois, 2, 0.5, 2)  # noqa: E731
    x = torch.rand(1, 1, 6, 7, dtype=torch.float64)
    jacobian = jacrev(pooled)(x).reshape(4, 42)
    found = hessian(lambda x: pooled(x).square().sum())(x)
    torch.testing.assert_close(found.reshape(42, 42), 2 * jacobian.mT @ jacobian)


@of(DECIDING)
def test_decisions_have_no_derivative(recipe):
    """As documented, and like those of detached inputs: their values are right, their tangents zero."""
    op, tensors = call_of(recipe)
    inputs = {name: each for name, each in tensors.items() if all(t.is_floating_point() for t in leaves(each))}
    fixed = {name: each for name, each in tensors.items() if name not in inputs}
    decided = lambda given: [each.double() for each in op({**given, **fixed})]  # noqa: E731
    found, tangents = jvp(decided, (inputs,), (tree_map(torch.ones_like, inputs),))
    check(found, decided(inputs))
    assert not any(each.any() for each in tangents)
    assert not any(each.any() for each in leaves(grad(lambda given: sum(map(torch.sum, decided(given))))(inputs)))


def test_gradients_of_each_sample_of_a_small_pyramid():
    torch.manual_seed(0)
    plain = torchvision.ops.FeaturePyramidNetwork([3, 5], 4, torchvision.ops.feature_pyramid_network.LastLevelMaxPool())
    plain = plain.double()
    ours = nn.FeaturePyramidNetwork([3, 5], 4, nn.LastLevelMaxPool()).double()
    ours.load_state_dict(plain.state_dict())
    maps = {"a": torch.rand(3, 1, 3, 9, 7, dtype=torch.float64), "b": torch.rand(3, 1, 5, 5, 4, dtype=torch.float64)}
    parameters = {name: each.detach() for name, each in plain.named_parameters()}

    def loss(module, parameters, x):
        return sum(each.square().sum() for each in functional_call(module, parameters, (x,)).values())

    found, expected = (
        vmap(grad(partial(loss, module)), in_dims=(None, 0))(parameters, maps) for module in (ours, plain)
    )
    check(found, expected)
    for i in range(3):
        alone = grad(partial(loss, ours))(parameters, {name: each[i] for name, each in maps.items()})
        check({name: each[i] for name, each in found.items()}, alone)
    x = {name: each[0] for name, each in maps.items()}
    found, expected = (jvp(partial(loss, module), (parameters, x), (parameters, x))[1] for module in (ours, plain))
    check(found, expected)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_whole_swapped_detector(training):
    """torchvision's own detector has no gradient here, because its roi_align has none."""
    model = detector("mask").train(training)
    fpn_fast.accelerate(model)
    images, targets = training_batch()
    x = {"image": images[0]} if not training else {name: each.detach() for name, each in model.named_parameters()}

    def loss(x):
        if not training:
            found = model([x["image"]])[0]
            return found["scores"].sum() + 1e-3 * (found["boxes"].sum() + found["masks"].sum())
        torch.manual_seed(5)
        return sum(functional_call(model, x, (images, copy.deepcopy(targets))).values())

    gradient = grad(loss)(x)
    assert sum(each.abs().sum() for each in leaves(gradient)) > 0
    tangent = jvp(loss, (x,), (tree_map(torch.ones_like, x),))[1]
    torch.testing.assert_close(tangent, sum(each.sum() for each in leaves(gradient)), rtol=1e-8, atol=0)
    check(gradient, by_autograd(loss, x))
