"""One process or several behind one protocol: `connect` detects which, and nothing else in the package asks."""

from graftwerk.training.distributed.connect import connect as connect
from graftwerk.training.distributed.launcher import is_main_process as is_main_process
from graftwerk.training.distributed.protocol import Distributed as Distributed
