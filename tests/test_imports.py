# SPDX-License-Identifier: Apache-2.0
"""Which libraries are imported, in processes of their own."""

from helpers import forked_python

WITHOUT_TORCHVISION = """
import sys; sys.modules['torchvision'] = None
import torch, fpn_fast
from fpn_fast import nn
fpn = nn.FeaturePyramidNetwork([8, 16], 4, nn.LastLevelMaxPool())
out = fpn({'a': torch.rand(1, 8, 8, 8), 'b': torch.rand(1, 16, 4, 4)})
print([(k, tuple(v.shape)) for k, v in out.items()], str(fpn_fast.accelerate(fpn)))
pooler = nn.MultiScaleRoIAlign(['a', 'b'], 3, 2)
maps = {'a': torch.rand(1, 8, 16, 16), 'b': torch.rand(1, 8, 8, 8)}
boxes = [torch.tensor([[3.0, 4, 50, 60]])]
print(pooler(maps, boxes, [(64, 64)]).shape, pooler.scales, pooler.map_levels(boxes).tolist())
print(nn.RoIAlign(2, 0.25, 2)(maps['a'], boxes).shape)
for pool, inputs in ((nn.RoIAlign(2, 0.25, 2), (maps['a'], *boxes)), (pooler, (maps, boxes, [(64, 64)]))):
    try: torch.jit.trace(lambda *_: pool(*inputs), (maps['a'],))
    except RuntimeError as error: print(error)
print(nn.detectron2.ROIPooler(2, (1 / 4, 1 / 8), 0, 'ROIAlign')(list(maps.values()), boxes).shape)
"""

UNASKED = """
import sys, torch, torchvision, fpn_fast
class Importer:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('mmdet', 'mmcv', 'mmengine', 'detectron2'): raise AssertionError(name)
sys.meta_path.insert(0, Importer())
print(len(fpn_fast.accelerate(torchvision.ops.RoIAlign(7, 1.0, 2)).swapped))
fpn_fast.nn.mmdet.build_neck(dict(type='FPN', in_channels=[8], out_channels=8, num_outs=1))
try: fpn_fast.integrations.mmdet
except AssertionError as error: print(error)
print(hasattr(fpn_fast.integrations, 'mmyolo'))
"""


def printed_by(code):
    done = forked_python.run(code)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_works_without_torchvision():
    assert printed_by(WITHOUT_TORCHVISION) == [
        "[('a', (1, 4, 8, 8)), ('b', (1, 4, 4, 4)), ('pool', (1, 4, 2, 2))] fpn_fast: this model has no module with "
        "a fused implementation",
        "torch.Size([1, 8, 3, 3]) [0.25, 0.125] [0]",
        "torch.Size([1, 8, 2, 2])",
        *["torch.jit.trace and torch.fx record torchvision's RoIAlign, and torchvision is not installed"] * 2,
        "torch.Size([1, 8, 2, 2])",
    ]


def test_nothing_imports_detection_libraries_unasked():
    assert printed_by(UNASKED) == ["1", "mmcv", "False"]
