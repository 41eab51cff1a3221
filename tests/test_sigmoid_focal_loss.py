# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from helpers.devices import DTYPES, without_synchronising
from helpers.focal_losses import ALPHA, CASES, check
from torchvision.ops import sigmoid_focal_loss as torchvision_loss

from fpn_fast import ops, reference
from fpn_fast.ops.sigmoid_focal_loss import _OP


def one_hot(labels, classes):
    return (labels[:, None] == torch.arange(classes)).double()


def loss_and_gradient(logits, labels, weights=None, **options):
    leaf = logits.detach().requires_grad_()
    loss = ops.sigmoid_focal_loss(leaf, labels, weights, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("name", [name for name in CASES if name != "large_logits"])
def test_the_reference_is_torchvisions(name):
    """And its derivative what autograd makes of torchvision's; whose log of a sigmoid is no number for large logits."""
    logits, labels, weights = CASES[name].inputs(torch.float64)
    leaf = logits.requires_grad_()
    expected = torchvision_loss(leaf, one_hot(labels, logits.size(1)), alpha=ALPHA, gamma=2) * weights[:, None]
    losses, slopes = reference.sigmoid_focal_loss(logits.detach(), labels, weights, ALPHA)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(slopes, torch.autograd.grad(expected.sum(), leaf)[0], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_is_the_float64_truth(backend, name, dtype):
    inputs = CASES[name].inputs(DTYPES[dtype])
    parts, gradient = _OP[backend](*inputs, ALPHA, True)
    check(parts, gradient, inputs)
    only_parts, nothing = _OP[backend](*inputs, ALPHA, False)
    assert torch.equal(only_parts, parts)
    assert nothing.shape == (0,)


# Logits that are large are part of the cases, and numpy, which interprets the kernel, warns of a zero.
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_triton_is_the_float64_truth(name, dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = CASES[name].inputs(DTYPES[dtype])
    parts, gradient = _OP["triton"](*(each.to(device) for each in inputs), ALPHA, True)
    check(parts.cpu(), gradient.cpu(), inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_cuda_is_the_float64_truth_without_synchronising(name, dtype):
    inputs = CASES[name].inputs(DTYPES[dtype])
    there = [each.cuda() for each in inputs]
    (parts, gradient), again = without_synchronising(lambda: _OP["cpp"](*there, ALPHA, True), 2)
    check(parts.cpu(), gradient.cpu(), inputs)
    assert torch.equal(parts, again[0])
    assert torch.equal(gradient, again[1])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_at_any_address(dtype, device):
    """Of a tensor's storage the first element left out, so that 16-byte accesses are not allowed."""
    logits, labels, weights = (each.to(device) for each in CASES["tiles_and_a_rest"].inputs(DTYPES[dtype]))
    shifted = torch.cat([logits.new_zeros(1), logits.flatten()])[1:].view(logits.shape)
    one, other = (_OP["cpp"](each, labels, weights, ALPHA, True) for each in (logits, shifted))
    assert all(map(torch.equal, one, other))


def test_a_sum_over_tiles_scaled(backend):
    logits, labels, weights = CASES["tiles_and_a_rest"].inputs(torch.float64)
    losses, slopes = reference.sigmoid_focal_loss(logits, labels, weights, 0.25)
    loss, gradient = loss_and_gradient(logits, labels, weights)
    torch.testing.assert_close(loss, losses.sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, slopes, rtol=1e-12, atol=0)
    leaf = logits.requires_grad_()
    (scaled,) = torch.autograd.grad(3 * ops.sigmoid_focal_loss(leaf, labels, weights), leaf)
    assert torch.equal(scaled, 3 * gradient)


def test_every_weight_is_1_and_any_integer_and_any_strides(backend):
    logits, labels, _ = CASES["one_tile"].inputs(torch.float32)
    expected = loss_and_gradient(logits, labels, torch.ones(len(logits)))
    assert all(map(torch.equal, loss_and_gradient(logits, labels), expected))
    strided = torch.stack([logits, logits], 2)[..., 0].t().contiguous().t()
    found = loss_and_gradient(strided, torch.stack([labels, labels], 1)[:, 0].short())
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(("anchors", "classes"), [(0, 5), (4, 0), (0, 0)])
def test_nothing(backend, anchors, classes):
    loss, gradient = loss_and_gradient(torch.zeros(anchors, classes), torch.zeros(anchors, dtype=torch.int64))
    assert loss == 0
    assert gradient.shape == (anchors, classes)


def test_nan_stays_and_infinities_are_limits(backend):
    logits = torch.tensor([[float("nan"), -1.0], [float("-inf"), -1.0], [float("inf"), -1.0]])
    nan, low, high = (loss_and_gradient(row[None], torch.tensor([-1])) for row in logits)
    without, slope = loss_and_gradient(logits[:1, 1:], torch.tensor([-1]))
    assert nan[0].isnan()
    assert nan[1][0, 0].isnan()
    assert nan[1][0, 1] == slope[0, 0]
    assert torch.equal(low[0], without)
    assert low[1][0, 0] == 0
    assert high[0] == float("inf")


def test_derivatives(backend):
    logits, labels, weights = CASES["odd"].inputs(torch.float64)
    leaf = logits.div(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.sigmoid_focal_loss(x, labels, weights, alpha=0.4), leaf)
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        torch.autograd.grad(ops.sigmoid_focal_loss(leaf, labels), leaf, create_graph=True)
    assert not ops.sigmoid_focal_loss(leaf.detach(), labels).requires_grad
    with torch.no_grad():
        assert not ops.sigmoid_focal_loss(leaf, labels).requires_grad


LOGITS, LABELS, WEIGHTS = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64), torch.zeros(4)
ERRORS = [
    ({"logits": [1]}, TypeError, "logits must be a tensor, got list"),
    ({"labels": [1]}, TypeError, "labels must be a tensor, got list"),
    ({"weights": 2.0}, TypeError, "weights must be a tensor, got float"),
    ({"logits": LOGITS.int()}, TypeError, "logits must be float64.*int32"),
    ({"labels": LABELS.float()}, TypeError, "labels must be of an integer type, got torch.float32"),
    ({"labels": LABELS.bool()}, TypeError, "labels must be of an integer type, got torch.bool"),
    ({"weights": LABELS}, TypeError, "weights must be float64.*int64"),
    ({"logits": LOGITS[None]}, ValueError, r"logits must be \[M, C\], got \(1, 4, 3\)"),
    ({"labels": LABELS[:2]}, ValueError, r"labels must be \[M\], \(4,\), got \(2,\)"),
    ({"weights": WEIGHTS[:, None]}, ValueError, r"weights must be \[M\], \(4,\), got \(4, 1\)"),
    ({"labels": LABELS.to("meta")}, ValueError, "labels must be on the device of logits, cpu, got meta"),
]


@pytest.mark.parametrize(("changed", "kind", "message"), ERRORS, ids=[message for _, _, message in ERRORS])
def test_errors(changed, kind, message):
    arguments = {"logits": LOGITS, "labels": LABELS, "weights": WEIGHTS} | changed
    with pytest.raises(kind, match=message):
        ops.sigmoid_focal_loss(**arguments)
