"""Traces in OpenTelemetry's form. Off unless an endpoint is set; the SDK is loaded only then."""
