"""Checks of scoring, audit and serving jobs; they do not import torch."""

import os
from functools import partial

from raydetect.artifacts.fleet import read_index, read_records
from raydetect.audit.measures import MEASURES
from raydetect.audit.rules import parse_rules
from raydetect.audit.webhook import webhook_of
from raydetect.check.locations import Check, first_shard, reachable
from raydetect.config import AuditSpec, ScoreSpec, ServeSpec, night_score, sink_storage, source_storage
from raydetect.gateway.allowed_uris import Prefixes
from raydetect.gateway.backend import load_served
from raydetect.gateway.http.tokens import read_tokens
from raydetect.planning.plan import plan_score
from raydetect.storage import Storage, join_uri, normalise_uri


def audit_checks(spec: AuditSpec) -> list[Check]:
    """Returns the checks of an audit beyond those of its scoring."""
    return [
        lambda: parse_rules(spec.alarm_when, MEASURES),
        lambda: webhook_of(spec.webhook, os.environ),
        lambda: plan_score(night_score(spec, join_uri(spec.sink.uri, "none")), ()),
    ]


def score_checks(spec: ScoreSpec | AuditSpec) -> list[Check]:
    """Returns the checks to run before scoring is planned."""
    models = Storage(spec.storage)
    return [
        lambda: first_shard(spec.source, source_storage(spec, spec.source)),
        lambda: read_records(read_index(normalise_uri(spec.artifact), models), models),
        lambda: reachable(spec.sink.uri, sink_storage(spec), "sink.uri"),
    ]


def serve_checks(spec: ServeSpec) -> list[Check]:
    """Returns the checks of a serving job."""
    storage = Storage(spec.storage)
    allow = spec.allow
    checks: list[Check] = [
        lambda: read_tokens(spec),
        lambda: [Prefixes.of(uris) for uris in (allow.sources, allow.sinks, allow.artifacts)],
    ]
    return checks + [partial(load_served, name, served, storage) for name, served in spec.detectors.items()]
