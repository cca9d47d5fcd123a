from .content import Content as Content
from .content import Row as Row
from .content import collect as collect
from .log import TRACKERS as TRACKERS
from .log import Logged as Logged
from .log import log_run as log_run
