import os
import sys
from pathlib import Path

# The tests import the files beside tests/
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# In all processes of the tests: another number of threads gives other last bits
os.environ["OMP_NUM_THREADS"] = "1"
