"""MoCo's ResNet-50 against torchvision's feature extraction."""

import pickle

import torch
from complaints import complaint
from torchvision.models import resnet50
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms import functional as reference

from drift.features import MoCoOptions

# Stage and block (from 0) in torchvision's names
MAPS = {
    "moco_layer1_blk2": "layer1.1", "moco_layer1": "layer1.2",
    "moco_layer2_blk2": "layer2.1", "moco_layer2_blk4": "layer2.3",
    "moco_layer3_blk2": "layer3.1", "moco_layer3_blk4": "layer3.3", "moco_layer3_blk6": "layer3.5",
    "moco_layer4_blk2": "layer4.1", "moco_layer4": "layer4.2",
}  # fmt: skip


@torch.no_grad()
def test_the_maps_are_those_of_torchvision(moco_file):
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.2
    network = resnet50()
    weights = torch.load(moco_file, weights_only=True)["state_dict"]
    of_query = {name.partition("encoder_q.")[2]: tensor for name, tensor in weights.items()}
    network.load_state_dict({k: of_query.get(k, v) for k, v in network.state_dict().items()})
    seen = reference.center_crop(reference.resize(images.clamp(0, 1), [256, 256], antialias=True), [224, 224])
    seen = reference.normalize(seen, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    theirs = create_feature_extractor(network.eval(), {node: name for name, node in MAPS.items()})(seen)

    sets = MoCoOptions(source=str(moco_file)).load()(images)
    for name, feature_map in theirs.items():
        vectors = feature_map.flatten(2).transpose(1, 2)  # [B, L, C]
        torch.testing.assert_close(sets[name], vectors, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sets[f"{name}_mean"], vectors.mean(1, keepdim=True), rtol=1e-4, atol=1e-4)
    patches = {name.removeprefix(of + "_") for of in MAPS for name in sets if name.startswith(of + "_")}
    assert {"mean", "std", "mean_2", "std_2", "mean_4", "std_4"} <= patches
    assert len(sets) == 9 * 3 + 7 * 2 + 4 * 2  # sides 56, 28, 14 and 7: patches where they divide


def test_a_checkpoint_that_is_damaged_or_another_is_one_line(tmp_path):
    path = tmp_path / "moco.pth.tar"

    def refusal(content=None):
        if content is not None:
            torch.save(content, path)
        message = complaint(lambda: MoCoOptions(source=str(path)).load())
        assert str(path) in message
        return message

    assert "there is no such file" in refusal()
    assert "conv1.weight" in refusal({"state_dict": {"module.encoder_q.fc.weight": torch.ones(2)}})
    assert "state_dict" in refusal({"model": {}})
    path.write_bytes(path.read_bytes()[:100])
    refusal()
    path.write_bytes(pickle.dumps({"state_dict": print}))
    assert "weights_only" in refusal() or "Weights only" in refusal()
