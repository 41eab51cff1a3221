# SPDX-License-Identifier: Apache-2.0
"""A forward keeps nothing that a call in another mode or thread, or torchvision's module after restore(), can meet."""

import copy
import threading

import pytest
import torch
from helpers.small_detectors import KINDS
from test_detectors import images, targets
from test_tracing import Flat, whole
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fpn_fast


def kept_by(value, seen=None):
    """The tensors in what a module keeps, and numbers that a tracer has yet to find, by their id."""
    seen = set() if seen is None else seen
    if isinstance(value, (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return {id(value): value}
    if id(value) in seen or isinstance(value, type):
        return {}
    seen.add(id(value))
    if not isinstance(value, (list, tuple, set)):
        value = (value if isinstance(value, dict) else getattr(value, "__dict__", {})).values()
    return {key: each for part in value for key, each in kept_by(part, seen).items()}


def detect(model):
    return model.eval()(images())


def training(model):
    """In which batch normalisation counts nothing."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return model


def learn(model):
    """The gradient of the losses to the images."""
    own = [each.requires_grad_() for each in images()]
    torch.manual_seed(0)
    losses = training(model)(own, [dict(each) for each in targets()])
    return torch.autograd.grad(sum(losses.values()), own) if torch.is_grad_enabled() else losses


def in_inference_mode(model):
    with torch.inference_mode():
        detect(model)
        learn(model)


def in_a_thread_in_inference_mode(model):
    thread = threading.Thread(target=in_inference_mode, args=(model,))
    thread.start()
    thread.join()


def with_fake_tensors(model):
    for call in (detect, learn):
        # The lengths of lists are data.
        with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(Exception, match=r"aten\."):
            call(model)


def in_an_export(model):
    with torch.no_grad():
        for strict in (False, True):
            try:
                torch.export.export(Flat(model.eval()), (images()[0],), strict=strict)
            except Exception as error:
                # Data decide the lengths of lists: what matters is what a failed export leaves behind.
                assert "torch" in type(error).__module__  # noqa: PT017


def under_vmap(model):
    parameters = {name: each.detach() for name, each in model.named_parameters()}
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda x: model.eval()([x])[0]["boxes"])(torch.stack([images()[0]] * 2))
    torch.func.grad(lambda p: sum(torch.func.functional_call(training(model), p, (images(), targets())).values()))(
        parameters
    )


MODES = [in_inference_mode, in_a_thread_in_inference_mode, with_fake_tensors, in_an_export, under_vmap]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
def test_nothing_is_kept_that_another_mode_meets(kind, mode):
    if mode in (in_an_export, under_vmap) and kind not in ("mask", "retinanet"):
        pytest.skip("one of each kind")
    model = whole(kind)
    fpn_fast.accelerate(model)
    fresh = copy.deepcopy(model)
    before = kept_by(model)
    mode(model)
    assert kept_by(model).keys() == before.keys()
    with torch.no_grad():
        for found, expected in zip(detect(model), detect(fresh), strict=True):
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(map(torch.equal, learn(model), learn(fresh)))
    fpn_fast.restore(model)
    assert kept_by(model).keys() == before.keys()
    assert not any("_numbers" in vars(module) for module in model.modules())
    learn(model)
