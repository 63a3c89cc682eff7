"""The gateways of the comparison of ways: what Serve is asked to run."""

from __future__ import annotations

from ray.serve.schema import ServeDeploySchema

from load_tests.bench.ways import WAYS, applications
from tests.serve_configs import FAKE_MODEL, suite_config

SPEED = {"time_to_first_token_s": 0.02, "time_per_token_s": 0.01}


def test_each_way_is_a_gateway_with_an_address_of_its_own_beside_one_model() -> None:
    config = suite_config(real_model=False, gateways=1)
    config["applications"][1:] = applications(SPEED)
    ours, model, *carriers = ServeDeploySchema.model_validate(config).applications
    assert (ours.route_prefix, model.name, model.route_prefix) == ("/", FAKE_MODEL, None)
    assert {one.route_prefix for one in carriers} == {f"/{way}" for way in WAYS}
    assert [one.args["way"] for one in carriers] == list(WAYS)
