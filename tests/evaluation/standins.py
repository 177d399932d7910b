"""Networks with random weights and the interface of Inception's published files."""

import threading

import pytest
import torch

from drift.evaluation.reference import Peers
from drift.runtime.torchvision import ensure_torchvision


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 7, stride=6)
        self.mix = torch.nn.Linear(8 * 4 * 4, 2048)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.adaptive_avg_pool2d(torch.tanh(2 * self.conv(x)), [4, 4])
        return torch.relu(self.mix(x.flatten(1)))


class Inception(torch.nn.Module):
    """`layers`, `output` and the arguments of `forward` as in inception-2015-12-05.pt, which also resizes."""

    def __init__(self):
        super().__init__()
        self.layers = Layers()
        self.output = torch.nn.Linear(2048, 1008)

    def forward(
        self, x: torch.Tensor, return_features: bool = False, no_output_bias: bool = False
    ) -> torch.Tensor:
        x = torch.nn.functional.interpolate(x, [299, 299], mode="bilinear", align_corners=False)
        features = self.layers((x - 127.5) / 127.5)
        if return_features:
            return features
        if no_output_bias:
            return torch.nn.functional.linear(features, self.output.weight).softmax(1)
        return self.output(features).softmax(1)


def save_inception(path, seed=0):
    torch.manual_seed(seed)
    model = Inception()
    torch.nn.init.normal_(model.output.weight, std=0.1)
    torch.jit.script(model).save(str(path))


def random_port():
    """Inception as pytorch-fid ports it, with random weights of a size that lets the images through."""
    ensure_torchvision()
    from cleanfid import inception_pytorch

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *args, **kwargs: None)
        network = inception_pytorch.fid_inception_v3()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return network.eval()


def peers_of(rank, world_size, all_reduce_sum):
    """For `work` of `run_ranks`, where a sum makes everybody wait."""
    return Peers(rank, world_size, all_reduce_sum, wait=lambda: all_reduce_sum(torch.zeros(())))


def run_ranks(world_size, work):
    """`work(rank, all_reduce_sum)` of every rank, in threads that really wait for each other."""
    barrier = threading.Barrier(world_size, timeout=60)
    slots, results = [None] * world_size, [None] * world_size

    def run(rank):
        def all_reduce_sum(tensor):
            slots[rank] = tensor
            barrier.wait()
            total = torch.stack(slots).sum(0)
            barrier.wait()
            return total

        try:
            results[rank] = work(rank, all_reduce_sum)
        except BaseException as error:
            results[rank] = error
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
