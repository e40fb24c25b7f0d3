"""Lets torchvision be imported beside a CPU build of torch; scripts/label_env.sh puts it into the environment.

torchvision registers shapes for two of its compiled operators when it is imported. Its ordinary wheel is built for
CUDA and its compiled part does not load beside a CPU torch, so these operators do not exist and the import fails. This
declares them, without an implementation, just before torchvision is imported: using them is an error, as it should be.
"""

import importlib.abc
import sys


class _Declare(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            self.keep = library
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules[__name__].library = library  # it ends with the object


sys.meta_path.insert(0, _Declare())
