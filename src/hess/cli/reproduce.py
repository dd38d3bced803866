"""``hess reproduce``: tables and figures of the paper, from our implementation."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from hess.cli.console import (
    Device,
    Dtype,
    Json,
    command_line,
    console,
    prepare_folder,
    print_json,
    progress_bar,
    use_threads,
)


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Make tables and figures of the paper anew: results, picture and a page beside the paper's.

    Names: fig1 fig4 fig5 fig6 fig7 fig8 fig9 fig10 fig11 figS1 figS2 figS3 table1 table2 tableS1
    tableS2, merging (token merging), readings (open readings of the paper), or all of these; or
    beyond, which stands for all of what goes beyond the paper. What several of them need is
    measured once. A stopped run continues: type the same command again.

    Example: hess reproduce fig6 --scenes 16
    """

    names: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="NAME")] = (
        field()
    )
    """What to reproduce."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("results")
    """Folder that gets a folder for each name."""
    model: Annotated[str | None, tyro.conf.arg(metavar="NAME|PATH")] = None
    """Instead of nano, or pi3-nano where the paper has π³: see hess evaluate."""
    profile: Annotated[str | None, tyro.conf.arg(metavar="NAME|FILE")] = None
    """Profile of the model; by default the one bundled with it."""
    data: Annotated[str | None, tyro.conf.arg(metavar="NAME|PATH")] = None
    """Instead of procedural:test: a folder whose layout is recognised."""
    protocol: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Named protocol, see hess evaluate; by default the scenes as they come."""
    truth: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """Folder of ground truth that the protocol needs and the data lacks."""
    scenes: int | None = None
    """Scenes at most, calibrations that an experiment makes included; 224 by default for most. A
    few make a quick run."""
    views: int | None = None
    """Views per scene, where the protocol does not say; 8 by default for most."""
    calibration: tuple[str, ...] = ()
    """Further data sets for figS1 to calibrate on."""
    jobs: int | None = None
    """Processes that measure, one thread each; by default 2 on a CPU with as many cores."""
    device: Device = "cpu"
    dtype: Dtype = "float32"
    json: Json = False

    def run(self) -> None:
        from hess.reproduce.plan import Choices, experiments_named
        from hess.reproduce.run import reproduce

        experiments_named(self.names)
        use_threads(1)
        jobs = self.jobs
        if jobs is None:
            jobs = min(2, os.cpu_count() or 1) if self.device == "cpu" else 1
        choices = Choices(
            model=self.model,
            profile=self.profile,
            data=self.data,
            protocol=self.protocol,
            truth=self.truth,
            views=self.views,
            scenes=self.scenes,
            calibration=self.calibration,
            device=self.device,
            dtype=self.dtype,
            jobs=jobs,
        )
        with progress_bar("reproduce") as progress:
            reproduced = reproduce(
                self.names,
                prepare_folder(self.output),
                choices,
                command=command_line(),
                progress=progress,
            )
        if self.json:
            print_json([each.as_dict() for each in reproduced])
            return
        for each in reproduced:
            console.print(f"[bold]{each.name}[/]: {each.title}", highlight=False)
            # Of many experiments the pages say it better.
            for sentence in each.findings if len(reproduced) == 1 else ():
                console.print(f"  {sentence}", markup=False, highlight=False)
            console.print(f"  wrote {each.folder / 'page.md'}", highlight=False, soft_wrap=True)
