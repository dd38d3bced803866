"""Mask tuning of Kwon et al. (NeurIPS 2022): scale kept heads to make up for the pruned ones."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hess.datasets.scene import Dataset, Scene
from hess.errors import ConfigError
from hess.models.base import GlobalAttentionSite, Model
from hess.models.layers import Block
from hess.models.swap import check_dense
from hess.transforms.pruned_heads import prune_heads

LARGEST_SCALE = 10.0
"""A layer with a larger scale than this is not tuned, nor is any after it, as in the paper."""

TOKENS_PER_CHUNK = 4096
"""Tokens whose equations are made at a time, which bounds the memory."""


class _Output(NamedTuple):
    heads: Tensor  # what goes into the output projection: [tokens, heads * head_dim]
    stream: Tensor  # the residual stream after the attention: [tokens, dim]


@torch.no_grad()
def tune_scales(model: Model, scenes: Dataset | Sequence[Scene], kept: Tensor) -> Tensor:
    """Scales of the kept heads that bring each global layer close to its dense output.

    Layer after layer, with those before it pruned and scaled: linear least squares of the
    residual stream after the attention against the one of the dense model. Of several best
    solutions the one nearest to 1 is taken.

    Args:
        model: dense.
        scenes: images to tune on, read once per layer; no ground truth is used.
        kept: bool [layers, heads].

    Returns:
        float64 [layers, heads], 0 for pruned heads.

    Raises:
        AlreadySparsifiedError: another method is at work in the model.
        ConfigError: no scene, or a global layer that is not in a :class:`Block`.
    """
    check_dense(model)
    if len(scenes) == 0:
        raise ConfigError("mask tuning needs at least one scene, found none")
    scales = kept.double()
    for site in model.global_attention_sites():
        heads = kept[site.layer_idx].nonzero().squeeze(1).tolist()
        if not heads or bool(kept[: site.layer_idx + 1].all()):
            continue
        gram = torch.zeros(len(heads), len(heads), dtype=torch.float64)
        moment = torch.zeros(len(heads), dtype=torch.float64)
        for scene in scenes:
            dense = _run(model, site, scene)
            with prune_heads(model, scales):
                pruned = _run(model, site, scene)
            for parts, gap in _equations(site, dense, pruned, heads):
                gram += (parts.mT @ parts).cpu()
                moment += (parts.mT @ gap).cpu()
        change = torch.linalg.lstsq(gram, moment[:, None], driver="gelsd").solution[:, 0]
        if not bool((1 + change).abs().max() <= LARGEST_SCALE):
            break
        scales[site.layer_idx, heads] = 1 + change
    return scales


def _run(model: Model, site: GlobalAttentionSite, scene: Scene) -> _Output:
    """What the attention at ``site`` does to the residual stream in one scene."""
    block = _block(site)
    seen: dict[str, Tensor] = {}
    handles = [
        block.register_forward_pre_hook(lambda _, args: seen.update(before=args[0])),
        block.attn.proj.register_forward_pre_hook(lambda _, args: seen.update(heads=args[0])),
        block.attn.register_forward_hook(lambda _, __, out: seen.update(attended=out)),
    ]
    try:
        model(scene.images.unsqueeze(0).to(block.attn.proj.weight.device))
    finally:
        for handle in handles:
            handle.remove()
    stream = seen["before"] + block.ls1(seen["attended"])
    return _Output(heads=seen["heads"][0], stream=stream[0])


def _equations(
    site: GlobalAttentionSite, dense: _Output, pruned: _Output, heads: list[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """In chunks [rows, ...]: what each of ``heads`` adds to the stream, and what is missing."""
    block = _block(site)
    weight = block.attn.proj.weight.unflatten(1, (block.attn.num_heads, -1))[:, heads]
    chunks = (x.split(TOKENS_PER_CHUNK) for x in (dense.stream, pruned.stream, pruned.heads))
    for wanted, found, outputs in zip(*chunks, strict=True):
        of_head = outputs.unflatten(1, (block.attn.num_heads, -1))[:, heads]
        parts = block.ls1(torch.einsum("thd,chd->thc", of_head, weight))
        yield parts.transpose(1, 2).flatten(0, 1).double(), (wanted - found).flatten().double()


def _block(site: GlobalAttentionSite) -> Block:
    if not isinstance(site.parent, Block) or site.attribute != "attn":
        raise ConfigError(
            f"mask tuning needs global layer {site.layer_idx} to be the attn of a Block, found "
            f"{site.attribute!r} of {type(site.parent).__name__}; leave tuning out"
        )
    return site.parent
