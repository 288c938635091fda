"""`python -m fastcollate.train`, as releases before 0.2 started a rank: the same as `python -m fastcollate train`."""

import runpy
import sys
import warnings

if __name__ == "__main__":
    warnings.warn("python -m fastcollate.train is now: python -m fastcollate train", FutureWarning, stacklevel=1)
    sys.argv.insert(1, "train")
    runpy.run_module("fastcollate", run_name="__main__")
