"""A run that logs its ids and checkpoints after every third batch; `test_loader` kills it."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.laws import as_json
    from tests.test_loader import feed, make

    corpus, log, checkpoint, total = *map(Path, sys.argv[1:4]), int(sys.argv[4])
    loader = make(corpus, num_workers=2)
    done = 0
    if checkpoint.exists():
        saved = json.loads(checkpoint.read_text())
        loader.load_state_dict(saved["loader"])
        done = saved["done"]
    while done < total:
        for batch in loader:
            ids = feed(loader, batch)
            with log.open("a") as file:
                file.write(json.dumps({"batch": done, "ids": ids}) + "\n")
            done += 1
            if done % 3 == 0:
                state = {"done": done, "loader": as_json(loader.state_dict())}
                checkpoint.with_suffix(".part").write_text(json.dumps(state))
                os.replace(checkpoint.with_suffix(".part"), checkpoint)
            time.sleep(0.02)
            if done == total:
                break
