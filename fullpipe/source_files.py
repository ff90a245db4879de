"""Where the Triton-side files of this project lie: templates, `model.py` files, backends."""

from __future__ import annotations

import sys
from pathlib import Path

from fullpipe.errors import SetupError


def source_root() -> Path:
    """The folder that holds `scheduler_model/`, `ensemble/`, `model_repository/`, `backends/`.

    A checkout has them beside the package; an installed wheel has them under share/fullpipe.

    Raises:
        SetupError: neither place has them.
    """
    places = (Path(__file__).parents[1], Path(sys.prefix) / "share" / "fullpipe")
    for place in places:
        if (place / "scheduler_model" / "config.pbtxt").is_file():
            return place
    raise SetupError(
        f"the model templates are in none of {', '.join(map(str, places))}; reinstall fullpipe"
    )
