"""What was learnt, kept in a file from run to run. A state that cannot be used is said in the log, and no more."""

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from kvprefetch.errors import StateError
from kvprefetch.plan.foresight import Foresight

log = logging.getLogger(__name__)


def restore(foresight: Foresight[Any], path: Path) -> None:
    """Go on with what `path` holds; a file that is not there is a first run. Raises nothing."""
    try:
        foresight.restore(path.read_bytes())
    except FileNotFoundError:
        return
    except (OSError, StateError) as error:
        log.warning("the state in %s cannot be used, learning begins anew: %s", path.name, error)


def save(foresight: Foresight[Any], path: Path) -> None:
    """Replace the file at once, readable by its owner alone. Raises nothing."""
    try:
        data = foresight.saved()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:  # mode 0600
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    except (OSError, StateError) as error:
        log.warning("what was learnt could not be kept in %s: %s", path.name, error)
