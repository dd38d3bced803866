"""Training batches from a pool of rendered scenes, each used a few times with other views."""

import random
from dataclasses import dataclass

import torch

from hess.datasets.procedural import Procedural, SceneBatch


@dataclass
class _Entry:
    index: int
    uses: int
    scene: SceneBatch


class ScenePool:
    """Draws batches; rendering is dearer than a training step, so a scene serves ``reuse`` times.

    Every use takes another random subset and order of the views, hence another reference view.

    Args:
        scenes: an unlimited supply of training scenes, taken in order.
        seed: of all choices.
        size: scenes held at a time.
        reuse: uses per scene.
    """

    def __init__(self, scenes: Procedural, *, seed: int, size: int = 60, reuse: int = 3) -> None:
        self.scenes = scenes
        self.size = size
        self.reuse = reuse
        self.next_index = 0
        self._random = random.Random(seed)
        self._entries: list[_Entry] = []

    def draw(self, batch: int, num_views: int) -> SceneBatch:
        """``batch`` scenes of ``num_views`` views each, with the colour channels permuted."""
        chosen = [self._draw_scene(num_views) for _ in range(batch)]
        channels = self._random.sample(range(3), 3)
        return SceneBatch(
            images=torch.cat([c.images for c in chosen])[:, :, channels],
            depth=torch.cat([c.depth for c in chosen]),
            world_from_cam=torch.cat([c.world_from_cam for c in chosen]),
            intrinsics=torch.cat([c.intrinsics for c in chosen]),
        )

    def _draw_scene(self, num_views: int) -> SceneBatch:
        if len(self._entries) < self.size:
            self._render([(self.next_index + i, 0) for i in range(12)])
            self.next_index += 12
        position = self._random.randrange(len(self._entries))
        entry = self._entries[position]
        entry.uses += 1
        if entry.uses >= self.reuse:
            self._entries[position] = self._entries[-1]
            self._entries.pop()
        views = self._random.sample(range(self.scenes.num_views), num_views)
        scene = entry.scene
        return SceneBatch(
            images=scene.images[:, views],
            depth=scene.depth[:, views],
            world_from_cam=scene.world_from_cam[:, views],
            intrinsics=scene.intrinsics[:, views],
        )

    def _render(self, wanted: list[tuple[int, int]]) -> None:
        """Add scenes (index, uses so far) to the pool."""
        rendered = self.scenes.render([index for index, _ in wanted])
        for i, (index, uses) in enumerate(wanted):
            one = slice(i, i + 1)
            scene = SceneBatch(
                images=rendered.images[one],
                depth=rendered.depth[one],
                world_from_cam=rendered.world_from_cam[one],
                intrinsics=rendered.intrinsics[one],
            )
            self._entries.append(_Entry(index, uses, scene))

    def state(self) -> dict[str, object]:
        """All that is needed to go on exactly here."""
        version, internal, gauss = self._random.getstate()
        return {
            "next_index": self.next_index,
            "entries": [(e.index, e.uses) for e in self._entries],
            "random": (version, list(internal), gauss),
        }

    def restore(self, state: dict) -> None:
        """Go on from :meth:`state`; the held scenes are rendered again."""
        version, internal, gauss = state["random"]
        self._random.setstate((version, tuple(internal), gauss))
        self.next_index = state["next_index"]
        self._entries.clear()
        for start in range(0, len(state["entries"]), 12):
            self._render([tuple(e) for e in state["entries"][start : start + 12]])
