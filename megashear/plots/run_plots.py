"""Draw all plots of a run (`megashear plot RUN`), also while it is running.

A plot without records is omitted.
"""

import zipfile
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from megashear.errors import DataError
from megashear.plots.mask_plots import draw_masks, within_layers
from megashear.plots.metric_series import Phase, phases_of
from megashear.plots.mixture_plots import draw_epochs, draw_losses, draw_weights
from megashear.plots.plot_style import STYLE, save
from megashear.plots.score_plots import importance_picture
from megashear.plots.training_plots import draw_multipliers, draw_sparsity, draw_speed, draw_training
from megashear.train.metrics import FILE_NAME, MASKS_NAME, SCORES_NAME, read_metrics

PICTURES: dict[str, Callable[[Sequence[Phase]], Figure | None]] = {
    "weights": draw_weights,
    "epochs": draw_epochs,
    "losses": draw_losses,
    "sparsity": draw_sparsity,
    "multipliers": draw_multipliers,
    "speed": draw_speed,
    "training": draw_training,
}


def read_masks(path: Path) -> dict[str, np.ndarray]:
    """Masks by granularity, as they act: 0 for every unit of a layer that is 0; none where the file is absent.

    Raises DataError where it is damaged.
    """
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return within_layers({name: arrays[name] for name in arrays.files})
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a file of masks ({error}); remove it to draw the rest") from None


def plot_run(run_folder: Path, output: Path | None = None) -> list[Path]:
    """Draw every picture of a run into `output` (None: `plots` in the run folder) and return their paths.

    Raises DataError where the folder has nothing to draw, StorageError where a picture cannot be written.
    """
    run_folder = Path(run_folder)
    if not any((run_folder / name).exists() for name in (FILE_NAME, MASKS_NAME, SCORES_NAME)):
        raise DataError(f"{run_folder}: no {FILE_NAME} here; give the folder of a run that has trained (run.folder)")
    records = read_metrics(run_folder / FILE_NAME) if (run_folder / FILE_NAME).exists() else []
    try:
        phases = phases_of(records)
    except KeyError as error:
        raise DataError(f"{run_folder / FILE_NAME}: a record without {error}; not a file of a run") from None
    masks = read_masks(run_folder / MASKS_NAME)
    output = Path(output) if output is not None else run_folder / "plots"
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        drawn = chain(draw_pictures(phases, masks), importance_picture(run_folder))
        written = [save(figure, output / f"{name}.png") for name, figure in drawn]
    if not written:
        raise DataError(
            f"{run_folder / FILE_NAME}: nothing to draw yet; wait for the first progress line and try again"
        )
    return written


def draw_pictures(phases: Sequence[Phase], masks: dict[str, np.ndarray]) -> Iterator[tuple[str, Figure]]:
    """Every picture for which something is recorded, with its name; the caller has set the style."""
    for name, draw in PICTURES.items():
        figure = draw(phases)
        if figure is not None:
            yield name, figure
    figure = draw_masks(masks)
    if figure is not None:
        yield "masks", figure
