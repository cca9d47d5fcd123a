from .events import STAGE_FINISHED as STAGE_FINISHED
from .events import VERIFIER_SUSPICIOUS as VERIFIER_SUSPICIOUS
from .events import announced as announced
from .execution import Executor as Executor
from .execution import watched_by as watched_by
from .steps import store_at as store_at
