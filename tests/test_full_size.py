"""VGGT-1B and pi3 at full size with random weights, from images to a sparse reconstruction."""

import pytest
import torch

import hess
from hess.datasets.scene import Scene
from hess.models.base import Model
from hess.models.loading import empty_model
from hess.models.random_weights import fill_randomly
from hess.policies import HeSS
from stand_ins import FixedScores

pytestmark = pytest.mark.slow

HEIGHT, WIDTH = 112, 154  # 8 x 11 patches


@pytest.fixture(params=["facebook/VGGT-1B", "yyfz233/Pi3"])
def model(request: pytest.FixtureRequest) -> Model:
    return fill_randomly(empty_model(request.param), seed=0, dtype=torch.bfloat16)


def test_two_views_through_sparse_attention(model: Model) -> None:
    """Tiles of 16 tokens, so that two small views have a map of 11 x 11 blocks to choose from."""
    generator = torch.Generator().manual_seed(0)
    scene = Scene(name="noise", images=torch.rand(2, 3, HEIGHT, WIDTH, generator=generator))
    sites = model.global_attention_sites()
    scores = torch.rand(len(sites), model.num_heads, generator=generator)
    policy = HeSS(FixedScores(scores), sparse_ratio=0.8, cdf_threshold=0.3)
    before = {key: tensor.data_ptr() for key, tensor in model.state_dict().items()}
    attentions = [site.module for site in sites]

    with hess.sparsify(model, policy, block_size_q=16, block_size_kv=16) as run:
        sparse = hess.reconstruct(model, scene)
    dense = hess.reconstruct(model, scene)

    assert 0.3 < run.stats.block_sparsity < 0.9
    assert run.stats.layers == tuple(range(len(sites)))
    for result in (sparse, dense):
        assert result.world_from_cam.shape == (2, 4, 4)
        assert result.intrinsics.shape == (2, 3, 3)
        assert result.depth.shape == result.confidence.shape == (2, HEIGHT, WIDTH)
        assert result.world_points.shape == (2, HEIGHT, WIDTH, 3)
        for name in ("world_from_cam", "intrinsics", "depth", "world_points", "confidence"):
            assert getattr(result, name).isfinite().all(), name
    assert not torch.equal(sparse.world_points, dense.world_points)
    assert {key: tensor.data_ptr() for key, tensor in model.state_dict().items()} == before
    assert [site.module for site in sites] == attentions
