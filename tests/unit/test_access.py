"""Who may do what: roles and groups of a token, mapped by the policy."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.completions.body import find_model
from serve_app.config import GatewayConfig, parse_config
from serve_app.errors import ConfigError, ModelNotFound, PermissionDenied
from serve_app.identity.access import counted_roles, with_access
from serve_app.identity.principal import Permission, Principal
from serve_app.records import PrincipalKind

MODELS = [
    {"name": "small", "app": "a", "aliases": ["s"]},
    {"name": "small-code", "app": "a"},
    {"name": "secret", "app": "a", "aliases": ["hidden"], "restricted": True},
]
USER, ADMIN, AUDITOR = Permission.USER, Permission.ADMIN, Permission.AUDITOR


def config(**access: Any) -> GatewayConfig:
    return GatewayConfig.model_validate({"models": MODELS, "access": access})


def token(*roles: str, groups: tuple[str, ...] = (), **more: Any) -> Principal:
    fields = {"kind": PrincipalKind.USER, "permissions": frozenset(), **more}
    return Principal(id="ann", roles=frozenset(roles), groups=frozenset(groups), **fields)


def usable(principal: Principal, policy: GatewayConfig) -> list[str]:
    return [model.name for model in policy.models if principal.may_use(model)]


OPEN = ["small", "small-code"]
ALL = [*OPEN, "secret"]
TEAM = {
    "roles": {
        "staff": {"permissions": [USER]},
        "boss": {"permissions": [USER, ADMIN]},
        "reviewer": {"permissions": [AUDITOR]},
        "coder": {"models": ["*-code"]},
    },
    "groups": {
        "lab": {"permissions": [USER], "models": ["secret"]},
        "lab/guests": {"permissions": [USER], "models": []},
        "all": {"models": ["*"]},
    },
}


@pytest.mark.parametrize(
    ("access", "roles", "groups", "permissions", "models"),
    [
        # The names that hold where nothing is mapped.
        ({}, ["comp-ai:user"], [], {USER}, OPEN),
        ({}, ["comp-ai:admin"], [], {ADMIN}, ALL),
        ({}, ["comp-ai:auditor"], [], {AUDITOR}, OPEN),
        ({}, ["comp-ai:user", "comp-ai:auditor"], ["lab"], {USER, AUDITOR}, OPEN),
        ({}, ["comp-ai:user", "comp-ai:model:small"], [], {USER}, ["small"]),
        ({}, ["comp-ai:user", "comp-ai:model:secret"], [], {USER}, ["secret"]),
        ({}, ["comp-ai:admin", "comp-ai:model:small"], [], {ADMIN}, ["small"]),
        # An alias, a pattern and a name of nothing are no models.
        ({}, ["comp-ai:user", "comp-ai:model:s"], [], {USER}, []),
        ({}, ["comp-ai:user", "comp-ai:model:*"], [], {USER}, []),
        ({}, ["comp-ai:user", "comp-ai:model:"], [], {USER}, []),
        # The scope of an API key is nobody's role.
        ({}, ["comp-ai:keys"], [], set(), OPEN),
        # Nothing that is known.
        ({}, [], [], set(), OPEN),
        ({}, ["offline_access", "Comp-AI:User", "comp-ai:root"], ["comp-ai:user"], set(), OPEN),
        # Mapped: the old names give nothing any more.
        (TEAM, ["comp-ai:user", "comp-ai:admin"], [], set(), OPEN),
        (TEAM, ["staff"], [], {USER}, OPEN),
        (TEAM, ["boss"], [], {USER, ADMIN}, ALL),
        (TEAM, ["reviewer"], [], {AUDITOR}, OPEN),
        (TEAM, ["staff", "coder"], [], {USER}, ["small-code"]),
        (TEAM, ["coder"], [], set(), ["small-code"]),
        (TEAM, [], ["lab"], {USER}, ["secret"]),
        (TEAM, [], ["lab", "all"], {USER}, ALL),
        (TEAM, ["staff", "coder"], ["lab"], {USER}, ["small-code", "secret"]),
        (TEAM, ["staff", "comp-ai:model:small"], ["lab"], {USER}, ["small", "secret"]),
        # A group is its whole path, and a role is no group.
        (TEAM, [], ["lab/guests"], {USER}, []),
        (TEAM, [], ["lab/others", "labs"], set(), OPEN),
        (TEAM, ["lab"], ["staff"], set(), OPEN),
        ({"roles": {}}, ["comp-ai:user"], [], set(), OPEN),
        (
            {"model_role_prefix": None},
            ["comp-ai:user", "comp-ai:model:small"],
            [],
            {USER},
            OPEN,
        ),
        ({"model_role_prefix": "llm/"}, ["comp-ai:user", "llm/small"], [], {USER}, ["small"]),
    ],
)
def test_what_roles_and_groups_give(
    access: dict[str, Any],
    roles: list[str],
    groups: list[str],
    permissions: set[Permission],
    models: list[str],
) -> None:
    policy = config(**access)
    mapped = with_access(token(*roles, groups=tuple(groups)), policy)
    assert mapped.permissions == permissions
    assert usable(mapped, policy) == models


def test_what_a_token_claims_of_itself_does_not_count() -> None:
    forged = token(permissions=frozenset({ADMIN}), models=frozenset({"secret"}))
    mapped = with_access(forged, config())
    assert mapped.permissions == frozenset()
    assert mapped.models is None


def test_a_policy_that_changed_holds_for_who_was_mapped_before() -> None:
    mapped = with_access(token("comp-ai:user", "comp-ai:model:secret"), config())
    again = with_access(mapped, config(**TEAM))
    assert again.permissions == frozenset()


@pytest.mark.parametrize(
    ("models", "expected"), [(None, OPEN), ({"secret"}, ["secret"]), (set(), [])]
)
def test_an_api_key_keeps_its_own_scope(models: set[str] | None, expected: list[str]) -> None:
    key = token(
        "boss",
        groups=("all",),
        kind=PrincipalKind.API_KEY,
        permissions=frozenset({USER}),
        models=None if models is None else frozenset(models),
    )
    policy = config(**TEAM)
    assert with_access(key, policy) == key
    assert usable(key, policy) == expected


@pytest.mark.parametrize("name", ["secret", "hidden"])
def test_a_model_that_is_not_allowed_looks_like_none(name: str) -> None:
    policy = config()
    asks = with_access(token("comp-ai:user"), policy)
    with pytest.raises(ModelNotFound) as forbidden:
        find_model(policy, name, asks)
    with pytest.raises(ModelNotFound) as absent:
        find_model(policy, "absent", asks)
    assert forbidden.value.message.replace(name, "absent") == absent.value.message
    assert (forbidden.value.denied, absent.value.denied) == ("model:secret", None)


def test_an_admin_holds_every_permission_and_an_auditor_only_one() -> None:
    admin, auditor = (
        with_access(token(f"comp-ai:{role}"), config()) for role in ("admin", "auditor")
    )
    assert all(admin.holds(permission) for permission in Permission)
    assert [p for p in Permission if auditor.holds(p)] == [AUDITOR]
    with pytest.raises(PermissionDenied) as refused:
        auditor.require(ADMIN)
    assert refused.value.denied == "comp-ai:admin"


def test_the_roles_that_count_are_those_that_the_policy_knows() -> None:
    asks = token("staff", "offline_access", "comp-ai:model:small", "comp-ai:user")
    assert counted_roles(asks, config(**TEAM)) == {"staff", "comp-ai:model:small"}
    more = {
        "standings": {"roles": {"offline_access": {}}},
        "limits": {"roles": {"x": {"members": "each"}}},
    }
    policy = GatewayConfig.model_validate({"models": MODELS, **more})
    assert counted_roles(token("offline_access", "x", "y"), policy) == {"offline_access", "x"}


@pytest.mark.parametrize(
    ("access", "message"),
    [
        (
            {"groups": {"lab": {"models": ["small", "smal"]}}},
            "user_config.access.groups.lab.models is 'smal'; allowed: the name of a model",
        ),
        (
            {"roles": {"staff": {"models": ["s"]}}},
            "user_config.access.roles.staff.models is 's'; allowed: the name of a model, no alias",
        ),
        (
            {"roles": {"staff": {"permissions": ["root"]}}},
            "user_config.access.roles.staff.permissions.0 is 'root'",
        ),
        ({"groups": {"lab": {"model": []}}}, "user_config.access.groups.lab.model is"),
        ({"groups": {"lab": {"models": ["[a]"]}}}, "user_config.access.groups.lab.models.0"),
        ({"model_role_prefix": ""}, "user_config.access.model_role_prefix is ''"),
    ],
)
def test_a_wrong_mapping_is_refused_by_name(access: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config(GatewayConfig, {"models": MODELS, "access": access}, "user_config")
    assert str(refused.value).startswith(message)
