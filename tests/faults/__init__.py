"""The promises about faults and hostile input, one file each; ``make faults`` prints the table."""

import sys
from pathlib import Path

for _folder in (Path(__file__).parents[1], Path(__file__).parents[1] / "train"):
    if str(_folder) not in sys.path:  # tiny_world, toy_task
        sys.path.append(str(_folder))
