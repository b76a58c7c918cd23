"""graft sample: let a model draw."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import GraftError
from ._model import ADAPTER, NAMED, adapted, model_settings
from ._output import working
from ._settings import parameters


def sample(
    model: Annotated[str, NAMED],
    label: Annotated[list[str], typer.Option(help="What to draw; may be given repeatedly.")],
    output: Annotated[str, typer.Option(metavar="FILE", help="The picture: a row of images for each label.")],
    zoom: Annotated[int, typer.Option(help="Pixels of the picture for one of an image, in either direction.")] = 8,
    adapter: Annotated[str | None, ADAPTER] = None,
    **options: Any,
) -> None:
    """Let MODEL with an adapter draw images of labels, and write them as one picture (PNG)."""
    with working():
        from torch.nn.functional import pad

        from ..tuning import sample as draw

        if Path(output).suffix.lower() != ".png":
            raise GraftError(f"the output {output} must end with .png")
        try:
            from PIL import Image
        except ImportError:
            raise GraftError("writing images needs pillow: pip install graft[images]") from None
        base, chosen = adapted(model, adapter, options, draw)
        images = draw(base, label, **chosen)
        spaced = pad(images, (0, 1, 0, 1), value=-1.0)
        rows = spaced.unflatten(0, (len(label), -1)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
        grid = ((rows + 1) * 127.5).round().byte().cpu().numpy()
        picture = Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid)
        picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(output)
    print(f"{len(images):,} images in {output}")


def options(args: Sequence[str]) -> list[inspect.Parameter]:
    from ..tuning import sample as draw

    return parameters(model_settings(draw))
