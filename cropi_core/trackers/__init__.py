"""Log a finished run to a tracker: MLflow, W&B or Trackio, in files of this machine.

content.py      what is logged, from the record and the artifacts of the run
log.py          check the request, and run the writer in a process of its own
writer.py       that process: one function a tracker; imports the tracker's package
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
