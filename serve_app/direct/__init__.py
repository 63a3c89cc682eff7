"""Calls from a gateway straight to a process that it calls for every request.

A call through Ray Serve takes milliseconds, of both processes' CPU time too. So Ray is asked once
where the other one listens, and with what token; from then on calls go over one connection. Where
there is none, or it is lost, a call goes through Ray as before: what is called is safe to repeat.
"""

from serve_app.direct.line import DirectLine
from serve_app.direct.procedures import Door, Handler, LineLost, Procedure
from serve_app.direct.server import DirectServer

__all__ = ["DirectLine", "DirectServer", "Door", "Handler", "LineLost", "Procedure"]
