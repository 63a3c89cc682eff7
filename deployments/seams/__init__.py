"""The gateway's seams (`serve_app.contracts`) joined to Ray Serve.

Foreign errors are mapped here, once: nothing of Ray gets past this package.
"""

from deployments.seams.limits import RayLimitKeeper
from deployments.seams.models import RayModelPool
from deployments.seams.records import RayRecordSink

__all__ = ["RayLimitKeeper", "RayModelPool", "RayRecordSink"]
