"""`python -m pipelines.harness`: lm-eval's own command line with one more model.

The model is called `griffin`, and takes the name of a method and the fields of `griffin.Method`:

    python -m pipelines.harness --model griffin --model_args pretrained=NAME,method=griffin,sparsity=0.5 --tasks piqa
"""

from __future__ import annotations

import sys

from pipelines.errors import UserError
from pipelines.tasks.harness_model import arguments_help, command_line


def main() -> None:
    """Call lm-eval; a mistake in the model's arguments ends the process with one line."""
    if {"-h", "--help"} & {*sys.argv[1:]}:
        print(arguments_help())
    try:
        command_line()
    except UserError as mistake:
        sys.exit(f"error: {mistake}")
    except (OSError, ValueError) as error:  # a model that is not there, a task that is none
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
