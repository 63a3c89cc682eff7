"""Policy: what the Serve config YAML says of the gateway, its models and its limits.

The gateway's part stands in `user_config`, so that Serve changes it in place.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Collection, Iterator
from decimal import Decimal
from typing import Annotated, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from serve_app.errors import ConfigError
from serve_app.identity.permission import Permission

Name = Annotated[
    str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]*$")
]

NamePattern = Annotated[
    str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9*?][A-Za-z0-9._/:*?-]*$")
]

_Model = TypeVar("_Model", bound=BaseModel)

# The last place in every queue.
MOST_PRIORITY = 1000


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Bodies(enum.StrEnum):
    """What the log keeps of prompts and answers, the least first.

    none: the row alone. metadata: its parameters and shape, no text. redacted: the texts, with
    secrets and personal data replaced by their kind. full: the texts as they were.
    """

    NONE = "none"
    METADATA = "metadata"
    REDACTED = "redacted"
    FULL = "full"

    @property
    def rank(self) -> int:
        """How much it keeps, beside the others."""
        return list(Bodies).index(self)

    @property
    def keeps_texts(self) -> bool:
        """Whether prompts and answers are kept, be it redacted."""
        return self in (Bodies.REDACTED, Bodies.FULL)


class Durability(enum.StrEnum):
    """When an answer's last byte goes out: after its record is on disk, or at once."""

    SYNC = "sync"
    ASYNC = "async"


class WhenLogFull(enum.StrEnum):
    """What becomes of requests that there is no room to record."""

    REFUSE = "refuse"
    DROP = "drop"


class Task(enum.StrEnum):
    """What a model is for."""

    GENERATE = "generate"
    EMBED = "embed"
    SCORE = "score"


Money = Annotated[Decimal, Field(gt=0, le=1_000_000_000, decimal_places=6)]
Price = Annotated[Decimal, Field(ge=0, le=1_000_000, decimal_places=6)]
_Tokens = Annotated[int, Field(ge=1, le=10**15)]


class LimitPolicy(_Config):
    """How much may be used. None is no limit. Days and months are those of UTC."""

    requests_per_minute: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Requests granted in any 60 s. No limit where not set; so with the others.",
    )
    tokens_per_minute: _Tokens | None = Field(
        default=None, description="Prompt and completion tokens used in any 60 s."
    )
    concurrency: int | None = Field(
        default=None, ge=1, le=100_000, description="Requests under way at once."
    )
    tokens_per_day: _Tokens | None = Field(
        default=None, description="Prompt and completion tokens used in a day of UTC."
    )
    tokens_per_month: _Tokens | None = Field(
        default=None, description="Prompt and completion tokens used in a calendar month of UTC."
    )
    cost_per_day: Money | None = Field(
        default=None,
        description="Money used in a day, by the prices of the models; six decimals at most.",
    )
    cost_per_month: Money | None = Field(
        default=None,
        description="Money used in a month, by the prices of the models; six decimals at most.",
    )

    @property
    def counts_money(self) -> bool:
        """Whether one of the limits is of money."""
        return self.cost_per_day is not None or self.cost_per_month is not None


class Members(enum.StrEnum):
    """For whom the policy of a group or role holds."""

    TOGETHER = "together"
    EACH = "each"


class MembersPolicy(LimitPolicy):
    """How much those of one group or role may use."""

    members: Members = Field(
        description="together: what all of them use is added up. each: every principal of it "
        "has the limits for itself."
    )


class LimitsConfig(_Config):
    """Limits by principal, group, role and over all. Whatever applies must grant."""

    currency: str | None = Field(
        default=None,
        pattern=r"^[A-Z]{3}$",
        description="Currency of every price and budget, such as `EUR`. Required where there is "
        "one.",
    )
    everyone: LimitPolicy = Field(
        default=LimitPolicy(), description="Policy of all principals together."
    )
    default: LimitPolicy = Field(
        default=LimitPolicy(), description="Policy of a principal that is not named below."
    )
    principals: dict[str, LimitPolicy] = Field(
        default_factory=dict,
        description="Policy by principal id. It replaces the default as a whole.",
    )
    groups: dict[str, MembersPolicy] = Field(
        default_factory=dict, description="Policy by group, without a leading slash."
    )
    roles: dict[str, MembersPolicy] = Field(
        default_factory=dict,
        description="Policy by role, as the issuer names it. The roles of an API key are its "
        "permissions.",
    )

    def policy_of(self, principal_id: str) -> LimitPolicy:
        """Return the policy that holds for `principal_id` itself."""
        return self.principals.get(principal_id, self.default)

    def policies(self) -> Iterator[tuple[str, LimitPolicy]]:
        """Yield every policy, with its place."""
        yield "everyone", self.everyone
        yield "default", self.default
        for place in ("principals", "groups", "roles"):
            for name, policy in getattr(self, place).items():
                yield f"{place}.{name}", policy

    @model_validator(mode="after")
    def _money_has_a_currency(self) -> Self:
        for place, policy in self.policies():
            if policy.counts_money and self.currency is None:
                raise _WrongSetting("currency", None, f"a currency, as {place} counts money")
        return self


class Standing(_Config):
    """How the requests of a principal are placed among those of others."""

    priority: int = Field(
        default=0,
        ge=-1000,
        le=MOST_PRIORITY,
        description="Place in the queues of gateway and engine; the lower number is served first.",
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="Share of a busy model, beside others of the same priority.",
    )


class StandingConfig(_Config):
    """Standings by role; of several roles the lowest priority and the largest weight hold."""

    default: Standing = Field(
        default=Standing(), description="Standing of who has none of the roles below."
    )
    roles: dict[str, Standing] = Field(
        default_factory=dict,
        description="Standing by role, as the issuer names it. Of several roles the lowest "
        "priority and the largest weight hold. The roles of an API key are its permissions.",
    )
    batch: Standing = Field(
        default=Standing(priority=100, weight=0.25),
        description="Standing of requests that come out of a batch, whoever made it.",
    )

    def of(self, roles: Collection[str]) -> Standing:
        """Return the standing of a principal with `roles`."""
        held = [self.roles[role] for role in roles if role in self.roles]
        if not held:
            return self.default
        return Standing(
            priority=min(standing.priority for standing in held),
            weight=max(standing.weight for standing in held),
        )


class BodiesConfig(_Config):
    """What is kept of prompts and answers. Of several that apply the strictest holds."""

    default: Bodies = Field(
        default=Bodies.FULL,
        description="Where neither the model nor a role of the caller is named below.",
    )
    models: dict[Name, Bodies] = Field(default_factory=dict, description="By name of the model.")
    roles: dict[str, Bodies] = Field(
        default_factory=dict,
        description="By role, as the issuer names it. The roles of an API key are its permissions.",
    )

    def of(self, model: str | None, roles: Collection[str], *others: Bodies | None) -> Bodies:
        """Return what is kept of a request to `model` by a principal with `roles`.

        `others` are what its key and its caller say; None says nothing.
        """
        named = [self.roles[role] for role in roles if role in self.roles]
        if model is not None and model in self.models:
            named.append(self.models[model])
        applying = [*(named or [self.default]), *(one for one in others if one is not None)]
        return min(applying, key=lambda one: one.rank)

    @property
    def most(self) -> Bodies:
        """The most that is kept of any request."""
        every = [self.default, *self.models.values(), *self.roles.values()]
        return max(every, key=lambda one: one.rank)

    @model_validator(mode="before")
    @classmethod
    def _a_word_is_the_default(cls, given: object) -> object:
        return {"default": given} if isinstance(given, str) else given


class WhenCold(enum.StrEnum):
    """What a request gets while no replica of its model runs."""

    WAIT = "wait"
    REFUSE = "refuse"


class QueueConfig(_Config):
    """The queue in front of each model, in each gateway."""

    max_waiting: int = Field(
        default=1000,
        ge=1,
        le=100_000,
        description="Requests that wait for one application at once, in each gateway. With four "
        "gateways four times as many can wait.",
    )
    at_ray: int = Field(
        default=32,
        ge=1,
        le=10_000,
        description="Of those, for how many Ray is asked for a replica at once. Ray's "
        "autoscaler sees these and no more. It does not change the order. Keep it at or below "
        "`max_queued_requests` of the model.",
    )


class ModelEntry(_Config):
    """One model that the gateway offers."""

    name: Name = Field(description="Name that clients send as `model`.")
    app: Name = Field(description="Serve application that serves it.")
    aliases: tuple[Name, ...] = Field(
        default=(), description="Other names that clients may send for it, such as `gpt-4o-mini`."
    )
    engine_name: Name | None = Field(
        default=None, description="Name that the engine knows it under; `name` where not set."
    )
    task: Task = Field(
        default=Task.GENERATE,
        description="What it is for: `generate` (chat and text), `embed` (embeddings, rerank "
        "and score) or `score` (rerank and score). Every model can tokenize. A request for "
        "something else is refused with 400.",
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Most completion tokens a request may ask for; `COMP_AI_MAX_TOKENS` where "
        "it is not set.",
    )
    default_max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Completion tokens of a request that names no number. Where not set: "
        "`max_tokens` for a chat, 16 for a text.",
    )
    when_cold: WhenCold = Field(
        default=WhenCold.WAIT,
        description="While no replica runs: `wait` up to `cold_timeout_s`, or `refuse` at once "
        "with 503 and start one.",
    )
    cold_timeout_s: float = Field(
        default=300.0,
        gt=0,
        description="Longest wait for a replica while none runs. It counts from the arrival; "
        "less than `queue_timeout_s` means nothing. With `refuse`, how long after the last "
        "request a replica is still asked for.",
    )
    start_guess_s: float = Field(
        default=60.0,
        gt=0,
        description="Time that a replica takes to start, until the gateway has measured one. It "
        "goes into `Retry-After`.",
    )
    context_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Most tokens of prompt and completion together (the engine's "
        "`max_model_len`). Bounds what a request reserves of the limits.",
    )
    template_tokens: int = Field(
        default=256,
        ge=0,
        description="Most tokens that the chat template adds to what a request says: a system "
        "prompt of its own, the words around messages and tools.",
    )
    price_per_million_prompt_tokens: Price | None = Field(
        default=None,
        description="In the currency of the limits, six decimals at most; nothing where not set.",
    )
    price_per_million_completion_tokens: Price | None = Field(
        default=None,
        description="In the currency of the limits, six decimals at most; nothing where not set.",
    )
    restricted: bool = Field(
        default=False,
        description="Only for those whose list of models names it, and for admins. To everybody "
        "else it does not exist.",
    )
    priority: bool = Field(
        default=False,
        description="The engine schedules by priority (`scheduling_policy: priority` in its "
        "`engine` arguments), so requests carry theirs to it. Without it they are placed in the "
        "gateway's queue alone: an engine that serves in order of arrival would take the number "
        "and ignore it.",
    )

    @property
    def has_price(self) -> bool:
        """Whether its tokens cost something."""
        prices = (self.price_per_million_prompt_tokens, self.price_per_million_completion_tokens)
        return any(prices)

    def cost_micros(self, prompt_tokens: int, completion_tokens: int) -> int:
        """Return what the tokens cost, in millionths of the currency, rounded up."""
        # A price for a million tokens is a number of millionths for one token.
        cost = prompt_tokens * (self.price_per_million_prompt_tokens or 0)
        cost += completion_tokens * (self.price_per_million_completion_tokens or 0)
        return math.ceil(cost)


class Grant(_Config):
    """What a role or a group gives to those who have it."""

    permissions: tuple[Permission, ...] = Field(
        default=(), description="Permissions that it gives."
    )
    models: tuple[NamePattern, ...] | None = Field(
        default=None,
        description="Models that it allows: real names, no aliases, or patterns with `*` and "
        "`?`. Who has one list or more may use what stands on them and nothing else; without a "
        "list, every model that is not restricted.",
    )


# The scope of an API key is nobody's role.
_DEFAULT_ROLES = {
    permission.value: Grant(permissions=(permission,))
    for permission in Permission
    if permission is not Permission.KEYS
}


class AccessConfig(_Config):
    """What roles and groups of a token give. What nothing here gives is not given."""

    roles: dict[str, Grant] | None = Field(
        default=None,
        description="Grants by role, as the issuer names it. Where not set, the roles "
        "`comp-ai:user`, `comp-ai:admin` and `comp-ai:auditor` give the permission of their name. "
        "With `roles` set, only those that stand there give something.",
    )
    groups: dict[str, Grant] = Field(
        default_factory=dict,
        description="Grants by group, as the issuer names it, without a leading slash: "
        "`platform/team-a`. A group gives nothing to the groups below it.",
    )
    model_role_prefix: str | None = Field(
        default="comp-ai:model:",
        min_length=1,
        description="A role of this prefix and a model's name allows that model, as a list of "
        "models does. `null` switches it off.",
    )

    @property
    def by_role(self) -> dict[str, Grant]:
        """What each role gives."""
        return _DEFAULT_ROLES if self.roles is None else self.roles

    def named_model(self, role: str) -> str | None:
        """Return the model that `role` names by its prefix, or None."""
        prefix = self.model_role_prefix
        return role.removeprefix(prefix) if prefix and role.startswith(prefix) else None


class Caps(_Config):
    """How much one request may ask for."""

    max_n: int = Field(default=16, ge=1, le=16_384, description="Largest `n`.")
    max_choices: int = Field(
        default=128, ge=1, description="Most answers of one request: `n` for each prompt."
    )
    max_prompts: int = Field(
        default=2048,
        ge=1,
        description="Most prompts of one request: texts to continue or to embed, documents, pairs.",
    )
    max_messages: int = Field(default=2048, ge=1, description="Most messages of a conversation.")
    max_stop: int = Field(default=16, ge=1, description="Most texts in `stop`.")


class IdempotencyConfig(_Config):
    """What is kept of requests that carry an Idempotency-Key."""

    keep_s: float = Field(
        default=24 * 3600.0,
        gt=0,
        le=366 * 24 * 3600.0,
        description="How long an answer is kept and sent again, from its end.",
    )
    max_stored_bytes: int = Field(
        default=4 * 1024 * 1024,
        ge=0,
        le=256 * 1024 * 1024,
        description="Longest answer kept. A longer one goes out once; a retry of it is refused "
        "with 409 `idempotency_answer_not_kept`.",
    )
    claim_s: float = Field(
        default=30.0,
        gt=0,
        le=3600.0,
        description="How long a key stays taken after the gateway that worked on it died. A "
        "living gateway renews it three times in that time.",
    )


class FilesConfig(_Config):
    """Files that are uploaded, and the results of batches."""

    max_bytes: int = Field(
        default=100 * 1024 * 1024,
        ge=1024,
        le=1024**3,
        description="Largest file of an upload. nginx has a limit of its own, "
        "`COMP_AI_NGINX_MAX_UPLOAD`.",
    )
    max_bytes_per_principal: int = Field(
        default=1024**3,
        ge=1024,
        description="Most bytes that the files of one principal may hold for it to upload more. "
        "Results count, and are never refused.",
    )
    retention_s: int = Field(
        default=30 * 24 * 3600,
        ge=3600,
        description="How long a file is kept that names no expiry, and a batch after its "
        "completion window.",
    )


class BatchesConfig(_Config):
    """How batches are run."""

    concurrency: int = Field(
        default=8,
        ge=0,
        le=1000,
        description="Most requests of batches under way at one gateway; 0 runs none there, and "
        "none anywhere where every gateway has 0.",
    )
    max_lines: int = Field(
        default=50_000, ge=1, le=1_000_000, description="Most requests in one batch."
    )
    max_open_per_principal: int = Field(
        default=50,
        ge=1,
        le=10_000,
        description="Most batches of one principal that have not ended.",
    )


class ResponsesConfig(_Config):
    """Responses that are stored, and those that are made in the background."""

    keep_s: float = Field(
        default=30 * 24 * 3600.0,
        gt=0,
        le=3660 * 24 * 3600.0,
        description="How long a response is kept after it was made or last continued; the "
        "default is 30 days.",
    )
    max_background: int = Field(
        default=32,
        ge=0,
        le=10_000,
        description="Responses that one gateway makes in the background at once.",
    )


class KeysConfig(_Config):
    """API keys that people make for themselves."""

    max_per_owner: int = Field(
        default=100,
        ge=0,
        le=100_000,
        description="Most valid keys of one owner. An administrator may make more of them.",
    )
    max_overlap_s: int = Field(
        default=7 * 24 * 3600,
        ge=0,
        le=366 * 24 * 3600,
        description="Longest time that the earlier secrets of a rotated key stay valid; the "
        "default is 7 days. It holds at `/admin/keys` too, not at the command line.",
    )
    max_life_s: int | None = Field(
        default=None,
        ge=60,
        le=3660 * 24 * 3600,
        description="Longest life of a secret that somebody makes for himself, from when it was "
        "made or last rotated. A key without an `expires_at` gets that one. No bound where not "
        "set; none at `/admin/keys` and at the command line.",
    )


class SignInConfig(_Config):
    """Sign-ins that fail."""

    failures_per_minute: int | None = Field(
        default=60,
        ge=1,
        le=1_000_000,
        description="How many sign-ins of one client address may fail at once, and anew in each "
        "minute, before they are answered with 429 `too_many_failed_sign_ins` instead of 401. A "
        "good credential passes all the same, also from that address. Not counted: requests "
        "without a credential. IPv6 addresses are counted by their /64. Each gateway counts for "
        "itself, for the 10,000 addresses that failed last; so with four gateways it is up to "
        "four times as many.",
    )


class GatewayConfig(_Config):
    """The gateway's policy."""

    models: tuple[ModelEntry, ...] = Field(
        min_length=1, description="Models on offer. No name or alias may lead to two of them."
    )
    default_model: str | None = Field(
        default=None,
        description="Model of a request that names none; such a request is refused where not set.",
    )
    caps: Caps = Field(default=Caps(), description="How much one request may ask for.")
    remote_media: bool = Field(
        default=False,
        description="Let the engine fetch pictures, sound and film from addresses that a "
        "request names. It fetches them from inside the network, so a client could reach what "
        "it should not: with this set, name the hosts in the engine's `allowed_media_domains`.",
    )
    access: AccessConfig = Field(
        default=AccessConfig(), description="Permissions and models by role and group."
    )
    limits: LimitsConfig = Field(
        default=LimitsConfig(), description="How much may be used, and by whom."
    )
    standings: StandingConfig = Field(
        default=StandingConfig(), description="Priority and share by role."
    )
    idempotency: IdempotencyConfig = Field(
        default=IdempotencyConfig(), description="Requests that carry an Idempotency-Key."
    )
    queue: QueueConfig = Field(
        default=QueueConfig(), description="The queue in front of each model."
    )
    files: FilesConfig = Field(
        default=FilesConfig(), description="Uploads and the results of batches."
    )
    batches: BatchesConfig = Field(default=BatchesConfig(), description="How batches are run.")
    responses: ResponsesConfig = Field(
        default=ResponsesConfig(), description="Stored and background responses."
    )
    keys: KeysConfig = Field(
        default=KeysConfig(), description="API keys that people make for themselves."
    )
    sign_in: SignInConfig = Field(default=SignInConfig(), description="Sign-ins that fail.")
    bodies: BodiesConfig = Field(
        default=BodiesConfig(),
        description="What the log keeps of prompts and answers. A word alone (`bodies: none`) "
        "is its default.",
    )
    durability: Durability = Field(
        default=Durability.SYNC,
        description="sync: the last byte waits until the record is on disk. "
        "async: it does not, and a crash can lose the record.",
    )
    when_log_full: WhenLogFull = Field(
        default=WhenLogFull.REFUSE,
        description="While no request log has room: refuse new requests with 503, or answer "
        "them, and drop and count the records that cannot be kept.",
    )
    deadline_s: float = Field(
        default=600.0,
        gt=0,
        description="Longest time for one request, its stream included. Recording it comes on top.",
    )
    queue_timeout_s: float = Field(
        default=30.0,
        gt=0,
        description="Longest wait for a replica of the model, as long as one runs. Keep it "
        "above 0.25: only after that the gateway looks whether one does.",
    )
    record_timeout_s: float = Field(
        default=30.0, gt=0, description="Longest wait for the record to be on disk."
    )
    keep_alive_s: float = Field(
        default=15.0, gt=0, description="Silence on a stream after which a comment is sent."
    )
    client_write_timeout_s: float = Field(
        default=30.0,
        gt=0,
        description="Longest wait for a client that takes nothing while its buffers are full.",
    )
    body_timeout_s: float = Field(
        default=60.0, gt=0, description="Longest wait for a request's body, once it is begun."
    )
    max_body_bytes: int = Field(
        default=4 * 1024 * 1024, ge=1024, description="Largest request body."
    )

    @model_validator(mode="after")
    def _names_lead_to_one_model(self) -> Self:
        known: set[str] = set()
        for index, model in enumerate(self.models):
            named = [("name", model.name), *(("aliases", alias) for alias in model.aliases)]
            for setting, name in named:
                if name in known:
                    allowed = "a name that no other model or alias has"
                    raise _WrongSetting(f"models.{index}.{setting}", name, allowed)
                known.add(name)
        if self.default_model is not None and self.default_model not in known:
            raise _WrongSetting("default_model", self.default_model, "the name of a model")
        return self

    @model_validator(mode="after")
    def _prices_have_a_currency(self) -> Self:
        for index, model in enumerate(self.models):
            if model.has_price and self.limits.currency is None:
                allowed = f"a currency, as models.{index} has a price"
                raise _WrongSetting("limits.currency", None, allowed)
        return self

    @model_validator(mode="after")
    def _grants_name_models(self) -> Self:
        names = {model.name for model in self.models}
        grants = {"roles": self.access.by_role, "groups": self.access.groups}
        for kind, by_name in grants.items():
            for holder, grant in by_name.items():
                for entry in grant.models or ():
                    if "*" not in entry and "?" not in entry and entry not in names:
                        setting = f"access.{kind}.{holder}.models"
                        allowed = "the name of a model, no alias, or a pattern with * or ?"
                        raise _WrongSetting(setting, entry, allowed)
        return self

    @model_validator(mode="after")
    def _bodies_name_models(self) -> Self:
        names = {model.name for model in self.models}
        for name in self.bodies.models:
            if name not in names:
                raise _WrongSetting(f"bodies.models.{name}", name, "the name of a model, no alias")
        return self

    def model(self, name: str) -> ModelEntry | None:
        """Return the entry of the model that is called `name` or has it as an alias, or None."""
        return next((m for m in self.models if name == m.name or name in m.aliases), None)

    def real_name(self, name: str) -> str:
        """Return the name of the model that `name` leads to, or `name` where it leads to none."""
        model = self.model(name)
        return name if model is None else model.name


class _WrongSetting(ValueError):
    """A setting that is wrong beside others."""

    def __init__(self, setting: str, value: object, allowed: str) -> None:
        self.setting = setting
        self.value = value
        self.allowed = allowed
        super().__init__(f"{setting} must be {allowed}")


def parse_config(kind: type[_Model], raw: object, where: str) -> _Model:
    """Validate `raw` as a `kind`.

    Raises:
        ConfigError: naming the place under `where`, the value and what is allowed.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        if isinstance(wrong := first.get("ctx", {}).get("error"), _WrongSetting):
            setting = ".".join(str(part) for part in (where, *first["loc"], wrong.setting))
            raise ConfigError(setting, wrong.value, wrong.allowed) from None
        path = ".".join(str(part) for part in (where, *first["loc"]))
        raise ConfigError(path, first["input"], first["msg"]) from None
